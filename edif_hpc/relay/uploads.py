"""The body of `POST /request`: a small envelope and an opaque blob, taken from the wire as they come.

The body is multipart, as nnsight sends it: a form field `data` and a file part `blob`. Small blobs stay in memory; larger
ones go in pieces to a temporary file of the blob folder, written and hashed in a thread, so that a slow disk never stops
the loop and memory stays the same for any size. Whatever ends an upload early, its file is gone afterwards; a broker
that accepts it has renamed it by then.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from edif_hpc.errors import InvalidInput, TooLarge
from edif_hpc.objects.directory import INLINE_BLOB_BYTES, BlobFolder, disk_error

ENVELOPE_BYTES = 64 << 10
PIECE_BYTES = 1 << 20
_FRAMING_BYTES = 16 << 10  # boundaries and part headers around envelope and blob


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A request's body. `blob` is its bytes, or the temporary file that holds them."""

    envelope: bytes
    blob: bytes | Path
    blob_bytes: int
    blob_sha256: str


def told_bytes(request: Request, limit_bytes: int) -> int:
    """The length of a body, if its client tells it; else 0. Raise `TooLarge` if it passes the limit."""
    text = request.headers.get("content-length", "")
    told = int(text) if text.isascii() and text.isdecimal() else 0
    if told > limit_bytes + ENVELOPE_BYTES + _FRAMING_BYTES:
        raise too_large(limit_bytes, told)
    return told


async def to_the_end(work: Callable[[], None]) -> None:
    """Run `work` in a thread, and return only when it is over, even if the caller is cancelled.

    Otherwise a cancelled request would close a file under the thread that writes to it.
    """
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait({thread})
        raise


@asynccontextmanager
async def receive_upload(
    request: Request, *, folder: BlobFolder, limit_bytes: int, room: Callable[[int], None]
) -> AsyncIterator[Upload]:
    """Read the body; raise `TooLarge` when it passes the limit, and what `room` raises when the disk is full."""
    spool = _Spool(folder, room)
    try:
        form = _Form(_boundary(request), spool, limit_bytes)
        async for chunk in request.stream():
            form.feed(chunk)
            await spool.settle()
        yield await form.finish()
    finally:
        if spool.on_disk:
            await to_the_end(spool.discard)


class _Spool:
    """The blob: in memory while it is small, else in a file."""

    def __init__(self, folder: BlobFolder, room: Callable[[int], None]) -> None:
        self._folder, self._room = folder, room
        self._pending = bytearray()
        self._hash = hashlib.sha256()
        self._path: Path | None = None
        self._file: BinaryIO | None = None
        self.size_bytes = 0

    @property
    def on_disk(self) -> bool:
        """Whether there is a file to remove."""
        return self._path is not None

    def add(self, data: bytes) -> None:
        """Take bytes; `settle` puts them where they belong."""
        self._pending += data
        self.size_bytes += len(data)

    async def settle(self) -> None:
        """Write what has gathered, once it is worth a thread."""
        if len(self._pending) >= PIECE_BYTES:
            await self._write()

    async def finish(self) -> tuple[bytes | Path, str]:
        """The blob and its hash."""
        if self.size_bytes <= INLINE_BLOB_BYTES:
            self._hash.update(self._pending)
            return bytes(self._pending), self._hash.hexdigest()
        path = await self._write(last=True)
        return path, self._hash.hexdigest()

    def discard(self) -> None:
        """Remove the file, unless it was renamed."""
        if self._file is not None:
            self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    async def _write(self, *, last: bool = False) -> Path:
        pending, self._pending = self._pending, bytearray()
        path = self._path = self._path or self._folder.temporary()

        def work() -> None:
            self._room(len(pending))
            if self._file is None:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self._file = os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0)
            self._hash.update(pending)
            rest = memoryview(pending)
            while rest:
                rest = rest[self._file.write(rest) :]
            if last:
                self._file.close()

        try:
            await to_the_end(work)
        except OSError as error:
            raise disk_error(path.parent, error) from error
        return path


class _Form:
    """The two parts of the body, in either order."""

    def __init__(self, boundary: bytes, spool: _Spool, limit_bytes: int) -> None:
        self._spool, self._limit_bytes = spool, limit_bytes
        self._envelope = bytearray()
        self._header = bytearray()
        self._value = bytearray()
        self._part = b""
        self._seen: set[bytes] = set()
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidInput(f"the body is not multipart/form-data: {error}") from error

    async def finish(self) -> Upload:
        missing = {b"data", b"blob"} - self._seen
        if missing or not self._ended:
            parts = ", ".join(sorted(each.decode() for each in missing)) or "the closing boundary"
            raise InvalidInput(f"the body ends without {parts}; it needs the parts data and blob")
        blob, digest = await self._spool.finish()
        return Upload(
            envelope=bytes(self._envelope),
            blob=blob,
            blob_bytes=self._spool.size_bytes,
            blob_sha256=digest,
        )

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._part = options.get(b"name", b"")
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        if self._part not in {b"data", b"blob"} or self._part in self._seen:
            raise InvalidInput(
                f"the body has an unexpected part {self._part[:40]!r}; it needs data and blob, once each"
            )
        self._seen.add(self._part)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == b"blob":
            self._spool.add(data[start:end])
            if self._spool.size_bytes > self._limit_bytes:
                raise too_large(self._limit_bytes, None)
        elif len(self._envelope) + end - start > ENVELOPE_BYTES:
            raise TooLarge(f"the envelope (form field data) has more than {ENVELOPE_BYTES} bytes")
        else:
            self._envelope += data[start:end]

    def _on_part_end(self) -> None:
        self._part = b""

    def _on_end(self) -> None:
        self._ended = True


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidInput(
            f"the body is {kind.decode('latin-1')[:80] or 'of no type'}; this relay takes multipart/form-data as nnsight 0.8 sends it"
        )
    return boundary


def too_large(limit_bytes: int, told: int | None) -> TooLarge:
    """What to say of a request above the limit."""
    shown = f"has {told} bytes" if told is not None else "is larger than allowed"
    return TooLarge(
        f"the request {shown}; {limit_bytes} are accepted from you. Everything that the traced block uses is sent with "
        "it: keep large tensors out of it, or make them inside the block. The operator can raise the limit (--max-request "
        "of your token or the deployment, max_request_bytes of the relay)"
    )
