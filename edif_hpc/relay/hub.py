"""`/hub`: a read-only Hugging Face hub, so that `HF_ENDPOINT=https://relay/hub` is all that a client needs.

nnsight asks the Hub even for its own part of the work: it builds the model without weights from the configuration, loads
the tokenizer, and has the model's name spelled the one way that the server compares. Where clients cannot reach the Hub,
or a model is not on it, the relay answers in the Hub's words: model records, listings, and files with the headers that
the client's cache is keyed by (`ETag`, `X-Repo-Commit`). An answer "not here" is 404 with `X-Error-Code`.

Names that are not here go to the real Hub, if the operator says so (`hub_upstream`). Clients send their Hugging Face
token with every call: here it is neither kept nor logged, and looked at only if `hub_login` asks for a relay's token.
"""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from edif_hpc.errors import NotAuthenticated
from edif_hpc.objects.repository import File, kind_of
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import Json
from edif_hpc.relay.files import PIECE_BYTES
from edif_hpc.relay.hub_catalog import Catalog
from edif_hpc.relay.hub_shelf import Repo

PREFIX = "/hub"


class Elsewhere(Protocol):
    """The real Hub, as far as it is needed (`hub_upstream.Upstream`)."""

    def allows(self, name: str) -> bool:
        """Whether it may be asked for this name."""

    async def record(self, http: HttpRequest) -> Response:
        """Its answer to an API call."""

    async def file(self, http: HttpRequest) -> Response:
        """Its metadata of a file, and where the bytes are."""


class Hub:
    """The routes under `/hub`. `accounts` is there if callers must show a token of this relay."""

    def __init__(
        self, *, catalog: Catalog, elsewhere: Elsewhere | None, accounts: Accounts | None
    ) -> None:
        self._catalog, self._elsewhere, self._accounts = catalog, elsewhere, accounts

    def routes(self) -> list[BaseRoute]:
        """For the application."""
        model = "/api/models/{name:path}"
        return [
            Mount(
                PREFIX,
                routes=[
                    Route(f"{model}/revision/{{revision:path}}", self.record),
                    Route(f"{model}/tree/{{revision}}", self.tree),
                    Route(f"{model}/tree/{{revision}}/{{folder:path}}", self.tree),
                    Route(f"{model}/xet-read-token/{{revision:path}}", self.xet),
                    Route(model, self.record),
                    Route("/{name:path}/resolve/{revision}/{file:path}", self.file),
                ],
            )
        ]

    async def record(self, http: HttpRequest) -> Response:
        """What is known of a model."""
        repo = await self._find(http)
        if isinstance(repo, Repo):
            return Json(_record(repo))
        return await repo.record(http)

    async def tree(self, http: HttpRequest) -> Response:
        """The files below a folder."""
        repo = await self._find(http)
        if not isinstance(repo, Repo):
            return await repo.record(http)
        folder = http.path_params.get("folder", "").strip("/")
        recursive = http.query_params.get("recursive", "").lower() in ("true", "1")
        entries = _tree(repo, folder, recursive=recursive)
        if folder and not entries:
            raise _no_entry(repo, folder)
        return Json(entries)

    async def xet(self, http: HttpRequest) -> Response:
        """Access to the real Hub's chunk store; what is here is not chunked."""
        repo = await self._find(http)
        if isinstance(repo, Repo):
            raise _missing("EntryNotFound", f"{repo.name} is served as plain files")
        return await repo.record(http)

    async def file(self, http: HttpRequest) -> Response:
        """A file's bytes, or with HEAD what a cache must know of it."""
        repo = await self._find(http)
        if not isinstance(repo, Repo):
            return await repo.file(http)
        name = http.path_params["file"]
        file = repo.served.get(name)
        if file is None:
            raise _no_entry(repo, name)
        path = repo.root / name
        try:
            found = await asyncio.to_thread(path.stat)
        except FileNotFoundError:
            raise _no_entry(repo, name) from None
        headers = {"etag": f'"{file.digest}"', "x-repo-commit": repo.manifest.commit}
        media_type = "application/octet-stream"
        return _BulkFile(path, headers=headers, media_type=media_type, stat_result=found)

    async def _find(self, http: HttpRequest) -> Repo | Elsewhere:
        """The model that the path names, here or elsewhere."""
        self._admit(http)
        name, revision = http.path_params["name"], http.path_params.get("revision")
        versions = await self._catalog.versions(name)
        for repo in versions:
            if revision is None or repo.is_at(revision):
                return repo
        if versions:
            there = ", ".join(f"{each.revision} ({each.manifest.commit})" for each in versions)
            text = f"{name} has no revision {revision!r} on this relay; there is {there}"
            raise _missing("RevisionNotFound", text)
        if self._catalog.absent(name):
            raise _missing(
                "RepoNotFound",
                f"{name} is deployed from a folder of the cluster, and its configuration and tokenizer are not on this "
                "relay; its operator makes them so with `edif-hpc hub publish`",
            )
        if self._elsewhere is not None and self._may_ask(name, self._elsewhere):
            return self._elsewhere
        here = ", ".join(each.name for each in await self._catalog.repos()) or "nothing yet"
        raise _missing("RepoNotFound", f"{name[:200]!r} is not on this relay. Here is: {here}")

    def _may_ask(self, name: str, elsewhere: Elsewhere) -> bool:
        return elsewhere.allows(name) or self._catalog.deployed(name)

    def _admit(self, http: HttpRequest) -> None:
        if self._accounts is None:
            return
        try:
            self._accounts.authenticate(credential(http.headers))
        except NotAuthenticated as error:
            text = f"{error}; this hub takes the API key of the relay as the Hub's token: set HF_TOKEN to it"
            raise _refused(401, "GatedRepo", text) from error


class _BulkFile(FileResponse):
    """A file in large pieces."""

    chunk_size = PIECE_BYTES


def _record(repo: Repo) -> dict[str, Any]:
    """What `GET /api/models/{name}` answers."""
    parameters = repo.manifest.parameters
    record: dict[str, Any] = {
        "id": repo.name,
        "modelId": repo.name,
        "sha": repo.manifest.commit,
        "private": False,
        "gated": False,
        "disabled": False,
        "pipeline_tag": repo.task,
        "library_name": "transformers",
        "tags": ["transformers", repo.task],
        "siblings": [
            {"rfilename": name, "size": file.size_bytes, "blobId": file.digest[:40]}
            for name, file in repo.served.items()
        ],
    }
    if parameters:
        record["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
    return record


def _tree(repo: Repo, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """What lies in a folder, or anywhere below it."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, Any]] = {}
    for name, file in repo.served.items():
        if not name.startswith(prefix):
            continue
        first, below, _ = name.removeprefix(prefix).partition("/")
        if below:
            entries.setdefault(prefix + first, _folder(repo, prefix + first))
        if recursive or not below:
            entries[name] = _entry(name, file)
    return list(entries.values())


def _entry(name: str, file: File) -> dict[str, Any]:
    return {"type": "file", "path": name, "oid": file.digest[:40], "size": file.size_bytes}


def _folder(repo: Repo, path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": repo.manifest.commit, "size": 0}


def _no_entry(repo: Repo, name: str) -> HTTPException:
    if name in repo.manifest.files:
        # Without the commit: a client notes for good what a commit does not have, and this may change.
        text = (
            f"{name} is part of {repo.name} but its {kind_of(name)} is not published on this relay"
        )
        return _missing("EntryNotFound", text)
    error = _missing("EntryNotFound", f"{repo.name} has no {name[:200]!r}")
    error.headers = {**(error.headers or {}), "x-repo-commit": repo.manifest.commit}
    return error


def _missing(code: str, text: str) -> HTTPException:
    return _refused(404, code, text)


def _refused(status: int, code: str, text: str) -> HTTPException:
    headers = {"x-error-code": code, "x-error-message": text.encode("ascii", "replace").decode()}
    return HTTPException(status, text, headers=headers)
