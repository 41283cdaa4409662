"""How an operator publishes a model on the hub, under `/api/hub`.

    POST   /api/hub                             announce: name, task, and each file's size and digest
    PUT    /api/hub/uploads/{handle}/{file}     each file that the announcement's answer lists as missing
    POST   /api/hub/uploads/{handle}            show it, in one step
    GET    /api/hub                             what is shown
    DELETE /api/hub/{org}/{name}                show it no more

Files go to disk as they come, so the size of a model costs no memory, and each is checked against what was announced. All
files of the model are announced, also those that are not published: the commit names the whole model.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edif_hpc.domain.people import Role, require
from edif_hpc.errors import InvalidInput
from edif_hpc.objects.directory import disk_error
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import Json, read_json
from edif_hpc.relay.files import PIECE_BYTES
from edif_hpc.relay.hub_catalog import Catalog
from edif_hpc.relay.hub_shelf import Description, Repo, Shelf
from edif_hpc.relay.uploads import to_the_end


class HubApi:
    """The routes under `/api/hub`."""

    def __init__(self, *, shelf: Shelf, catalog: Catalog, accounts: Accounts) -> None:
        self._shelf, self._catalog, self._accounts = shelf, catalog, accounts
        self._changing = asyncio.Lock()  # one change of the shelf at a time

    def routes(self) -> list[BaseRoute]:
        """For the application; they come before the rest of `/api`."""
        return [
            Route("/api/hub", self.listing, methods=["GET"]),
            Route("/api/hub", self.begin, methods=["POST"]),
            Route("/api/hub/uploads/{handle}/{file:path}", self.receive, methods=["PUT"]),
            Route("/api/hub/uploads/{handle}", self.finish, methods=["POST"]),
            Route("/api/hub/{org}/{name}", self.remove, methods=["DELETE"]),
        ]

    async def listing(self, http: HttpRequest) -> Response:
        """All that the hub shows."""
        self._operator(http)
        published = {each.name for each in self._shelf.repos()}
        found = await self._catalog.repos()
        return Json({"models": [_view(each, published=each.name in published) for each in found]})

    async def begin(self, http: HttpRequest) -> Response:
        """Announce a publication."""
        self._operator(http)
        description = await read_json(http, Description)
        async with self._changing:
            handle, missing = await asyncio.to_thread(self._shelf.begin, description)
        return Json({"upload": handle, "missing": missing}, status_code=201)

    async def receive(self, http: HttpRequest) -> Response:
        """One file."""
        self._operator(http)
        handle, name = http.path_params["handle"], http.path_params["file"]
        part, size = self._shelf.place(handle, name)
        try:
            await _write(http, part, size)
            await asyncio.to_thread(self._shelf.arrived, handle, name, part)
        except OSError as error:
            raise disk_error(part.parent, error) from error
        finally:
            await to_the_end(lambda: part.unlink(missing_ok=True))
        return Json({})

    async def finish(self, http: HttpRequest) -> Response:
        """Show what has arrived."""
        self._operator(http)
        async with self._changing:
            repo = await asyncio.to_thread(self._shelf.finish, http.path_params["handle"])
        return Json(_view(repo, published=True))

    async def remove(self, http: HttpRequest) -> Response:
        """Show a model no more."""
        self._operator(http)
        name = f"{http.path_params['org']}/{http.path_params['name']}"
        async with self._changing:
            await asyncio.to_thread(self._shelf.remove, name)
        return Json({})

    def _operator(self, http: HttpRequest) -> None:
        require(self._accounts.authenticate(credential(http.headers)), Role.OPERATOR)


def _view(repo: Repo, *, published: bool) -> dict[str, Any]:
    return {
        "repo_id": repo.name,
        "commit": repo.manifest.commit,
        "task": repo.task,
        "weights": repo.weights,
        "code": repo.code,
        "size_bytes": sum(each.size_bytes for each in repo.served.values()),
        "from": "published" if published else str(repo.root),
    }


async def _write(http: HttpRequest, path: Path, size: int) -> None:
    """Write the body, which must have this size, and sync it."""
    pending = bytearray()
    left = size
    with await asyncio.to_thread(path.open, "xb", 0) as file:

        def flush() -> None:
            rest = memoryview(pending)
            while rest:
                rest = rest[file.write(rest) :]

        async for chunk in http.stream():
            pending += chunk
            left -= len(chunk)
            if left < 0:
                raise InvalidInput(f"the file has more than the {size} bytes that were announced")
            if len(pending) >= PIECE_BYTES:
                await to_the_end(flush)
                pending = bytearray()
        await to_the_end(flush)
        await to_the_end(lambda: os.fsync(file.fileno()))
