"""Bytes between the worker and the relay or the object store, by signed URLs: one try each.

A blob is fetched to a file of the worker's scratch and its SHA-256 checked. A part is sent in
pieces, with its length known, so that no part is in memory as a whole. What a
failure means, and what to try next, is the callers' business: `Unavailable` says that it may work later, `Refused` that
the store answered and said no, to this URL at least.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
from socksio import SOCKSError

from edif_hpc.errors import EdifError, Unavailable

_TIMEOUT = httpx.Timeout(30.0, read=300.0, write=60.0)
_SHOWN_CHARS = 200
#: What a transfer can fail with. httpx lets through what a proxy that hangs up makes of its SOCKS library.
_FAILURES = (httpx.HTTPError, SOCKSError)


class BlobDamaged(EdifError):
    """The request's bytes cannot be had as they were accepted."""

    code = "blob_damaged"


class LinkExpired(EdifError):
    """The URL of a blob is not in force any more; a new lease brings a new one."""

    code = "link_expired"


class Refused(Unavailable):
    """The store answered a part with a refusal: its URL has expired, the upload is over, the bucket is full."""

    code = "part_refused"


class Transfer:
    """One HTTP client for all transfers of a worker. `proxy` is the URL of what they go through; `transport` replaces the network."""

    def __init__(
        self,
        timeout: httpx.Timeout = _TIMEOUT,
        transport: httpx.AsyncBaseTransport | None = None,
        proxy: str | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(
            timeout=timeout, trust_env=True, transport=transport, proxy=proxy
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def fetch(self, url: str, target: Path, *, size_bytes: int, sha256: str) -> None:
        """Download a blob and check it.

        Raises:
            BlobDamaged: it is gone, or different.
            LinkExpired: the URL is too old.
            Unavailable: the relay is away.
        """
        digest, count = hashlib.sha256(), 0
        try:
            async with self._http.stream("GET", url) as response:
                if response.status_code == httpx.codes.FORBIDDEN:
                    raise LinkExpired("the link to the request's bytes has expired")
                if response.status_code in (404, 410):
                    raise BlobDamaged(
                        f"the stored request cannot be read any more (HTTP {response.status_code})"
                    )
                response.raise_for_status()
                with target.open("wb") as file:
                    async for chunk in response.aiter_bytes(1 << 20):
                        file.write(chunk)
                        digest.update(chunk)
                        count += len(chunk)
        except _FAILURES as error:
            raise Unavailable(f"cannot fetch the request's bytes: {error!r}") from error
        if count != size_bytes or digest.hexdigest() != sha256:
            raise BlobDamaged(
                f"the stored request has {count} bytes and a different checksum than the {size_bytes} "
                "that were accepted"
            )

    async def put(self, url: str, body: AsyncIterator[bytes], size_bytes: int) -> str:
        """Put one part of known size; returns the tag that the store answers.

        Raises:
            Refused: the store says no.
            Unavailable: there was no answer.
        """
        where = f"{httpx.URL(url).scheme}://{httpx.URL(url).netloc.decode()}"
        try:
            response = await self._http.put(
                url, content=body, headers={"content-length": str(size_bytes)}
            )
        except _FAILURES as error:
            raise Unavailable(f"{where} does not take the result: {error!r}") from error
        if not response.is_success:
            told = " ".join(response.text.split())[:_SHOWN_CHARS]
            raise Refused(f"{where} refuses the result: HTTP {response.status_code} {told}")
        etag: str = response.headers.get("etag", "")
        return etag.strip('"')
