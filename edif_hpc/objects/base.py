"""Bytes under keys: where large results lie until their researcher has fetched them.

The relay decides and signs; the bytes flow between the worker, the store and the client by short-lived signed URLs, so
that no store credential leaves the relay. A result goes up in parts of `part_bytes` (the last may be shorter), each to
its own URL, and becomes visible at `complete`, which checks the size first. Keys hold request and attempt, so a
late or doubled upload can never replace another attempt's bytes.

Implementations: `directory.DirectoryStore` (the relay's own disk, URLs of the relay).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

PART_BYTES = 8 << 20


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

    async def part_urls(self, upload: Upload, first: int, count: int, *, base_url: str) -> list[str]:
        """Signed PUT URLs for parts `first`, …, counted from 1. `base_url` is where the worker reaches the relay."""

    async def complete(self, upload: Upload, parts: Sequence[UploadedPart], size_bytes: int) -> None:
        """Make the object durable and visible; `InvalidInput` if its size is not `size_bytes`."""

    async def abort(self, upload: Upload) -> None:
        """Throw an upload away; one that is gone already is no error."""

    async def read_url(self, key: str, *, base_url: str) -> str:
        """A signed GET URL that a researcher can open without a header. `NotFound` if there is no such object."""

    async def delete(self, key: str) -> None:
        """Delete an object; one that is gone already is no error."""
