"""Bytes between the worker and the relay or the object store, by signed URLs.

A blob is fetched to a file of the worker's scratch and its SHA-256 checked. A result goes up in parts of the size that the
relay named, several at a time, each with its length known; a refused link (expired) is asked for anew, a cut connection
is tried again. Memory is bounded by parts in flight, whatever the size of the result.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx

from edif_hpc.errors import EdifError, Unavailable
from edif_hpc.wire import messages as m

_TRIES = 5
_IN_FLIGHT = 3
_TIMEOUT = httpx.Timeout(30.0, read=300.0, write=300.0)


class BlobDamaged(EdifError):
    """The request's bytes cannot be had as they were accepted."""

    code = "blob_damaged"


@dataclass(frozen=True, kw_only=True)
class PartUrls:
    """Where parts go: `first` and the URLs from there on."""

    first: int
    urls: list[str]


AskUrls = Callable[[int, int], Awaitable[PartUrls]]


class Transfer:
    """One HTTP client for all transfers of a worker."""

    def __init__(self) -> None:
        self._http = httpx.AsyncClient(timeout=_TIMEOUT, trust_env=True)

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def fetch(self, url: str, target: Path, *, size_bytes: int, sha256: str) -> None:
        """Download a blob and check it; `BlobDamaged` if it is gone or different, `Unavailable` if the relay is away."""
        digest, count = hashlib.sha256(), 0
        try:
            async with self._http.stream("GET", url) as response:
                if response.status_code in (403, 404, 410):
                    raise BlobDamaged(
                        f"the stored request cannot be read any more (HTTP {response.status_code})"
                    )
                response.raise_for_status()
                with target.open("wb") as file:
                    async for chunk in response.aiter_bytes(1 << 20):
                        file.write(chunk)
                        digest.update(chunk)
                        count += len(chunk)
        except httpx.HTTPError as error:
            raise Unavailable(f"cannot fetch the request's bytes: {error!r}") from error
        if count != size_bytes or digest.hexdigest() != sha256:
            raise BlobDamaged(
                f"the stored request has {count} bytes and a different checksum than the {size_bytes} that were accepted"
            )

    async def upload(
        self, source: Path, size_bytes: int, part_bytes: int, ask: AskUrls
    ) -> list[m.Part]:
        """Put a file in parts; returns them in order. `Unavailable` when a part fails too often."""
        count = max(1, -(-size_bytes // part_bytes))
        seats = asyncio.Semaphore(_IN_FLIGHT)
        with source.open("rb") as file:

            async def put(number: int, url: str) -> m.Part:
                async with seats:
                    body = await asyncio.to_thread(
                        os.pread, file.fileno(), part_bytes, (number - 1) * part_bytes
                    )
                    return await self._put(number, url, body, ask)

            parts: list[m.Part] = []
            for first in range(1, count + 1, 64):
                wanted = await ask(first, min(64, count + 1 - first))
                numbered = enumerate(wanted.urls, start=wanted.first)
                try:
                    async with asyncio.TaskGroup() as group:
                        tasks = [group.create_task(put(number, url)) for number, url in numbered]
                except ExceptionGroup as failed:
                    raise failed.exceptions[0] from failed
                parts += [task.result() for task in tasks]
        return parts

    async def _put(self, number: int, url: str, body: bytes, ask: AskUrls) -> m.Part:
        seen = "nothing"
        for attempt in range(_TRIES):
            try:
                response = await self._http.put(url, content=body)
            except httpx.HTTPError as error:
                seen = repr(error)
                await asyncio.sleep(
                    0.2 * 2**attempt
                )  # back off from a server that does not answer
                continue
            if response.status_code in (200, 201, 204):
                return m.Part(number=number, etag=response.headers.get("etag", "").strip('"'))
            seen = f"HTTP {response.status_code}: {response.text[:200]}"
            if response.status_code in (403, 404):
                url = (await ask(number, 1)).urls[0]
            else:
                await asyncio.sleep(0.2 * 2**attempt)
        raise Unavailable(
            f"part {number} of the result could not be stored after {_TRIES} tries (last: {seen})"
        )
