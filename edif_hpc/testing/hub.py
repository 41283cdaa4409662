"""A Hugging Face hub on the loopback interface.

An unmodified nnsight client asks the hub even for its own part of the work: to build the model
without weights, and to spell the model's name in the one way that the server compares. Tests have
no network, so this is the hub's contract as far as huggingface_hub and transformers use it: model
records, and files with the headers that their cache is keyed by. It serves folders read-only; a
folder's commit is a hash of its contents, so a changed model has a changed commit.

    with serve_hub({"edif/tiny-gpt2": path}) as url:
        subprocess.run([...], env={"HF_ENDPOINT": url, "HF_HOME": fresh_folder})

or, for a process of its own that ends on SIGTERM:

    python -m edif_hpc.testing.hub --model edif/tiny-gpt2=PATH --alias tiny=edif/tiny-gpt2 --port 0
"""

from __future__ import annotations

import hashlib
import json
import math
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from edif_hpc.testing.wait import wait_until

HOST = "127.0.0.1"
START_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Repo:
    """One folder as the hub shows it: a name, a commit, and the hash of each file."""

    name: str
    path: Path
    commit: str
    hashes: Mapping[str, str]

    @classmethod
    def read(cls, name: str, path: Path) -> Repo:
        """Take stock of the folder; files added later are not served."""
        files = sorted(file for file in path.rglob("*") if file.is_file())
        hashes = {str(file.relative_to(path)): _sha256(file) for file in files}
        commit = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:40]
        return cls(name=name, path=path, commit=commit, hashes=hashes)

    def record(self) -> dict[str, Any]:
        """Return what `GET /api/models/{name}` answers."""
        counts = [_parameters(self.path / f) for f in self.hashes if f.endswith(".safetensors")]
        return {
            "id": self.name,
            "modelId": self.name,
            "sha": self.commit,
            "private": False,
            "pipeline_tag": "text-generation",
            "library_name": "transformers",
            "tags": ["transformers", "safetensors"],
            "siblings": [{"rfilename": file} for file in self.hashes],
            "safetensors": {"parameters": {"F32": sum(counts)}, "total": sum(counts)},
        }


class Hub:
    """The routes over a set of repositories; `aliases` maps old names to present ones."""

    def __init__(self, repos: Mapping[str, Path], aliases: Mapping[str, str]) -> None:
        self._repos = {name: Repo.read(name, path) for name, path in repos.items()}
        self._aliases = dict(aliases)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        return Starlette(
            routes=[
                Route("/api/models/{name:path}/revision/{revision}", self._record),
                Route("/api/models/{name:path}/tree/{revision}", self._tree),
                Route("/api/models/{name:path}/tree/{revision}/{folder:path}", self._tree),
                Route("/api/models/{name:path}", self._record),
                Route("/{name:path}/resolve/{revision}/{file:path}", self._file),
            ]
        )

    def _repo(self, request: Request) -> Repo:
        name = request.path_params["name"]
        repo = self._repos.get(self._aliases.get(name, name))
        if repo is None:
            raise _not_found("RepoNotFound", f"no repository {name!r}")
        revision = request.path_params.get("revision", "main")
        if revision not in {"main", repo.commit}:
            raise _not_found("RevisionNotFound", f"no revision {revision!r} of {name!r}")
        return repo

    async def _record(self, request: Request) -> Response:
        return JSONResponse(self._repo(request).record())

    async def _tree(self, request: Request) -> Response:
        repo = self._repo(request)
        folder = request.path_params.get("folder", "")
        inside = [f for f in repo.hashes if not folder or f.startswith(f"{folder}/")]
        if folder and not inside:
            raise _not_found("EntryNotFound", f"no folder {folder!r} in {repo.name!r}")
        return JSONResponse(
            [
                {
                    "type": "file",
                    "path": file,
                    "oid": repo.hashes[file],
                    "size": (repo.path / file).stat().st_size,
                }
                for file in inside
            ]
        )

    async def _file(self, request: Request) -> Response:
        repo = self._repo(request)
        file = request.path_params["file"]
        etag = repo.hashes.get(file)
        if etag is None:
            raise _not_found("EntryNotFound", f"no file {file!r} in {repo.name!r}")
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": repo.commit}
        return FileResponse(
            repo.path / file, headers=headers, media_type="application/octet-stream"
        )


@contextmanager
def serve_hub(
    repos: Mapping[str, Path], aliases: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Serve `repos` (name to folder) from a thread; yield the URL."""
    server = _server(Hub(repos, aliases or {}).app())
    with _listen(port=0) as listener:
        thread = threading.Thread(
            target=server.run, args=([listener],), name="loopback-hub", daemon=True
        )
        thread.start()
        try:
            wait_until(lambda: server.started, START_TIMEOUT_S, "the loopback hub serves")
            yield _url(listener)
        finally:
            server.should_exit = True
            thread.join()


def _server(app: Starlette) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))


def _listen(*, port: int) -> socket.socket:
    return socket.create_server((HOST, port))


def _url(listener: socket.socket) -> str:
    return f"http://{HOST}:{listener.getsockname()[1]}"


def _not_found(code: str, message: str) -> HTTPException:
    return HTTPException(404, message, headers={"X-Error-Code": code, "X-Error-Message": message})


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parameters(file: Path) -> int:
    """Count the parameters in a safetensors file: 8 bytes of length, then a JSON header."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return sum(math.prod(t["shape"]) for name, t in header.items() if name != "__metadata__")


class _Pair(click.ParamType[tuple[str, str]]):
    """`NAME=VALUE` on the command line."""

    name = "name=value"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            self.fail(f"{value!r} is not of the form NAME=VALUE", param, ctx)
        return name, rest


@click.command()
@click.option("--model", "models", type=_Pair(), multiple=True, required=True, help="NAME=PATH")
@click.option("--alias", "aliases", type=_Pair(), multiple=True, help="OLD=NAME")
@click.option("--port", default=0, show_default=True, help="0: a free one.")
def main(
    models: tuple[tuple[str, str], ...], aliases: tuple[tuple[str, str], ...], port: int
) -> None:
    """Serve model folders as a hub; print its URL, end on SIGTERM."""
    hub = Hub({name: Path(path) for name, path in models}, dict(aliases))
    with _listen(port=port) as listener:
        click.echo(_url(listener))
        _server(hub.app()).run([listener])


if __name__ == "__main__":
    main()
