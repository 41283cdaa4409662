"""Bytes under keys: where large results lie until their researcher has fetched them.

The relay decides and signs; the bytes flow between the worker, the store and the client by short-lived signed URLs, so
that no store credential leaves the relay. A result goes up in parts of `part_bytes` (the last may be shorter), each to
its own URL, and becomes visible at `complete`, which checks the size first. A key is `request/attempt`, so a late or
doubled upload can never replace another attempt's bytes.

Every method says one of three things when it fails. `NotFound`: it is not there. `InvalidInput`: what was put is not
what was announced; put it again. `Unavailable`: the store does not do it now (away, full, refusing); nothing was
lost, ask again later.

Implementations, held to one contract suite: `directory.DirectoryStore` (the relay's own disk, URLs of the relay) and
`s3.S3Store` (a bucket, URLs of the bucket).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from edif_hpc.errors import InvalidInput

PART_BYTES = 8 << 20
LINK_S = 3600.0

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}(?:/[A-Za-z0-9_.-]{1,80}){0,3}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """An upload under way. `handle` is the store's own name for it."""

    key: str
    handle: str
    part_bytes: int


@dataclass(frozen=True, kw_only=True)
class UploadedPart:
    """A part that the worker says it has put, with the tag that the store answered."""

    number: int
    etag: str


class ObjectStore(Protocol):
    """Bytes under keys. Methods are coroutines because stores are slow; none may block the loop."""

    part_bytes: int

    async def begin(self, key: str) -> Upload:
        """Start an upload."""

    async def resume(self, key: str) -> Upload | None:
        """The upload of this key that is under way, if there is one; the relay may have been restarted since."""

    async def part_urls(
        self, upload: Upload, first: int, count: int, *, base_url: str
    ) -> list[str]:
        """Signed PUT URLs for parts `first`, …, counted from 1. `base_url` is where workers reach the relay."""

    async def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], size_bytes: int
    ) -> None:
        """Make the object durable and visible; a repetition after success is no error.

        Raises:
            InvalidInput: its size is not `size_bytes`, or a part is missing or another one.
            NotFound: the upload is over: it was aborted, or lost.
        """

    async def abort(self, upload: Upload) -> None:
        """Throw an upload away; one that is gone already is no error."""

    async def size(self, key: str) -> int:
        """How many bytes an object has; `NotFound` if there is none."""

    async def read_url(self, key: str, *, base_url: str) -> str:
        """A signed GET URL that a researcher can open without a header.

        `NotFound` if the store says that there is no such object; a store that cannot be asked is no reason to
        refuse, since a URL is made without it.
        """

    async def delete(self, folder: str) -> None:
        """Delete every object whose key begins with `folder/`; none is no error."""

    async def sweep(self, *, objects_before: float, uploads_before: float) -> int:
        """Delete what is left from before these moments (UNIX seconds); returns how many.

        No request knows of it any more: attempts that were given up while, or after, their result went up.
        """

    async def close(self) -> None:
        """Let go of connections."""


def check_key(key: str) -> str:
    """The key itself, if it cannot mean anything but itself in a path or a URL."""
    if not _KEY.fullmatch(key) or any(part.strip(".") == "" for part in key.split("/")):
        raise InvalidInput(f"the object key {key[:100]!r} is malformed")
    return key
