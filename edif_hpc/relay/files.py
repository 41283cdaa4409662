"""Bytes behind signed links: results out, parts of results in, and large request blobs for workers.

A link is its own credential: it names one method and one path, and it expires. Downloads come from files in pieces of
1 MiB, which on a loopback is several times as fast as the usual 64 KiB, and support `Range`, so that a broken download
can go on. There is never a `Content-Encoding`: the bytes are already as the client wants them, and a client that
undid it would lose its own compression.

An uploaded part is written at its offset as it arrives; nothing of it is kept in memory but the current piece.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from edif_hpc.clock import Clock
from edif_hpc.errors import InvalidInput, NotFound, TooLarge
from edif_hpc.objects.base import ObjectStore
from edif_hpc.objects.directory import BlobFolder, DirectoryStore, disk_error
from edif_hpc.objects.signing import Signer
from edif_hpc.relay.uploads import to_the_end

PIECE_BYTES = 1 << 20
_MAX_PIECES = 512  # of one write; the kernel takes 1024

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_MEDIA_TYPE = "application/octet-stream"


class Broker(Protocol):
    """What is needed of the broker."""

    async def result_bytes(self, request_id: str) -> bytes | str:
        """A result's bytes, or its key in the object store."""


class Files:
    """The routes of signed links."""

    def __init__(
        self,
        *,
        broker: Broker,
        objects: ObjectStore,
        blobs: BlobFolder,
        signer: Signer,
        clock: Clock,
    ) -> None:
        self._broker, self._objects, self._blobs = broker, objects, blobs
        self._signer, self._clock = signer, clock
        self._disk = objects if isinstance(objects, DirectoryStore) else None

    def routes(self) -> list[BaseRoute]:
        """For the application."""
        own: list[BaseRoute] = [
            Route("/results/{id}", self.result),
            Route("/blobs/{id}", self.blob),
        ]
        if self._disk is None:
            return own
        return [*own, *Parts(self._disk, self._check).routes()]

    async def result(self, http: HttpRequest) -> Response:
        """A request's result, from its row or from its file."""
        self._check(http, "GET")
        found = await self._broker.result_bytes(http.path_params["id"])
        if isinstance(found, bytes):
            return _piece_of(found, http.headers.get("range"))
        if self._disk is None:
            return RedirectResponse(await self._objects.read_url(found, base_url=""))
        return await _file(self._disk.path(found), f"the result of {http.path_params['id']}")

    async def blob(self, http: HttpRequest) -> Response:
        """A large request blob, for the worker that holds its lease."""
        self._check(http, "GET")
        request_id = http.path_params["id"]
        return await _file(self._blobs.path(request_id), f"the blob of request {request_id}")

    def _check(self, http: HttpRequest, method: str) -> None:
        check_link(self._signer, http, method, self._clock.wall())


class Parts:
    """The routes of the directory store: parts in, objects out. `check` judges a link."""

    def __init__(self, disk: DirectoryStore, check: Callable[[HttpRequest, str], None]) -> None:
        self._disk, self._check = disk, check

    def routes(self) -> list[BaseRoute]:
        """For the application."""
        return [
            Route("/objects/{key:path}", self.object),
            Route("/uploads/{handle}/{number:int}", self.part, methods=["PUT"]),
        ]

    async def object(self, http: HttpRequest) -> Response:
        """An object of the directory store."""
        self._check(http, "GET")
        key = http.path_params["key"]
        return await _file(self._disk.path(key), f"the object {key}")

    async def part(self, http: HttpRequest) -> Response:
        """One part of a result, written at its offset. Its ETag is its size: the line and the disk have checksums of their own."""
        self._check(http, "PUT")
        number = http.path_params["number"]
        if number < 1:
            raise InvalidInput(f"parts are counted from 1, not {number}")
        path, offset = self._disk.part_path(http.path_params["handle"], number)
        limit = self._disk.part_bytes
        told = http.headers.get("content-length", "")
        if told.isdecimal() and int(told) > limit:
            raise TooLarge(f"the part has {told} bytes; a part has at most {limit}")
        size = await _write_at(http, path, offset, limit)
        return Response(status_code=200, headers={"etag": f'"{number}-{size}"'})


def check_link(signer: Signer, http: HttpRequest, method: str, now: float) -> None:
    """Raise `NotPermitted` unless a request came by a link of ours that is in force."""
    expires = http.query_params.get("expires", "")
    signature = http.query_params.get("sig", "")
    if not (expires.isascii() and expires.isdecimal() and signature.isascii()):
        expires = signature = ""  # no link of ours looks like this
    signer.check(method, http.url.path, expires, signature, now)


class _BulkFile(FileResponse):
    """A file in large pieces."""

    chunk_size = PIECE_BYTES


async def _file(path: Path, what: str) -> Response:
    try:
        found = await asyncio.to_thread(path.stat)
    except FileNotFoundError:
        raise NotFound(f"{what} is not there (any more)") from None
    return _BulkFile(path, media_type=_MEDIA_TYPE, stat_result=found)


def _piece_of(data: bytes, asked: str | None) -> Response:
    """The bytes, or the one range of them that was asked for."""
    headers = {"accept-ranges": "bytes"}
    match = _RANGE.fullmatch(asked or "")
    if match is None or match.group() == "bytes=-":
        return Response(data, media_type=_MEDIA_TYPE, headers=headers)
    first, last = match.groups()
    start = int(first) if first else max(0, len(data) - int(last))
    stop = min(len(data), int(last) + 1) if first and last else len(data)
    if start >= stop:
        return Response(status_code=416, headers={"content-range": f"bytes */{len(data)}"})
    headers["content-range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], status_code=206, media_type=_MEDIA_TYPE, headers=headers)


async def _write_at(http: HttpRequest, path: Path, offset: int, limit: int) -> int:
    """Write the body at `offset` of the file; returns its size.

    What arrives is gathered to pieces and never joined: on a relay with one core, each copy of a large result is felt.
    """
    pieces: list[bytes] = []
    written = gathered = 0

    def write() -> None:
        _write_all(fd, pieces, offset + written)

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            async for chunk in http.stream():
                pieces.append(chunk)
                gathered += len(chunk)
                if written + gathered > limit:
                    raise TooLarge(f"the part is larger than {limit} bytes")
                if gathered >= PIECE_BYTES or len(pieces) >= _MAX_PIECES:
                    await to_the_end(write)
                    written, gathered, pieces = written + gathered, 0, []
            await to_the_end(write)
        finally:
            os.close(fd)
    except OSError as error:
        raise disk_error(path.parent, error) from error
    return written + gathered


def _write_all(fd: int, pieces: list[bytes], position: int) -> None:
    done = os.pwritev(fd, pieces, position) if pieces else 0
    size = sum(len(each) for each in pieces)
    while done < size:  # a disk that is nearly full takes less than it is given
        done += os.pwrite(fd, b"".join(pieces)[done:], position + done)
