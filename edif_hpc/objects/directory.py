"""Objects in a directory of the relay's own disk; its URLs are the relay's.

A part is written at its own offset of one temporary file, so that completing is an fsync and a rename, never a copy. The
object is durable when `complete` returns: file synced, renamed, folder synced.

The temporary file is named after its key and this boot of the machine. So an upload goes on after the relay was killed,
whose parts lie in the kernel's cache at worst; but not after the machine was, which may have lost some of them.

The relay's HTTP routes call `part_path` and `path` to find the files behind its links.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from edif_hpc.clock import Clock
from edif_hpc.errors import InvalidInput, NotFound, StoreUnavailable
from edif_hpc.objects.base import LINK_S, PART_BYTES, Upload, UploadedPart, check_key
from edif_hpc.objects.signing import Signer

#: A request's blob up to this size lies in its row; a larger one is a file here.
INLINE_BLOB_BYTES = 64 << 10

_T = TypeVar("_T")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class DirectoryStore:
    """Objects below `root`."""

    def __init__(
        self, root: Path, *, signer: Signer, clock: Clock, part_bytes: int = PART_BYTES
    ) -> None:
        self.part_bytes = part_bytes
        self._root = root
        self._signer = signer
        self._clock = clock
        self._boot = _BOOT_ID.read_text().strip()
        for name in ("objects", "uploads"):
            (root / name).mkdir(parents=True, exist_ok=True, mode=0o700)

    async def begin(self, key: str) -> Upload:
        """Start an upload, or go on with the one under way."""
        upload = self._upload(key)
        await self._disk(lambda: self._upload_file(upload.handle).touch(mode=0o600))
        return upload

    async def resume(self, key: str) -> Upload | None:
        """The upload of this key, if its file is there."""
        upload = self._upload(key)
        return upload if self._upload_file(upload.handle).is_file() else None

    async def part_urls(
        self, upload: Upload, first: int, count: int, *, base_url: str
    ) -> list[str]:
        """Signed PUT URLs of the relay."""
        until = self._clock.wall() + LINK_S
        paths = [f"/uploads/{upload.handle}/{number}" for number in range(first, first + count)]
        return [base_url + self._signer.link("PUT", path, expires_at=until) for path in paths]

    def part_path(self, handle: str, number: int) -> tuple[Path, int]:
        """The file and the offset where a part of an upload goes; `NotFound` for an upload that is over."""
        path = self._upload_file(handle)
        if not path.is_file():
            raise NotFound(f"there is no upload {handle[:8]}…; it was completed or aborted")
        return path, (number - 1) * self.part_bytes

    async def complete(
        self, upload: Upload, parts: Sequence[UploadedPart], size_bytes: int
    ) -> None:
        """Sync, check the size, rename, sync the folder."""

        def finish() -> None:
            source, target = self._upload_file(upload.handle), self.path(upload.key)
            if not source.exists():
                if target.is_file() and target.stat().st_size == size_bytes:
                    return
                raise NotFound(
                    f"the upload of {upload.key} is over, and is not {size_bytes} bytes"
                )
            with _open_existing(source) as fd:
                found = os.fstat(fd).st_size
                if found != size_bytes or len(parts) != -(-size_bytes // self.part_bytes):
                    raise InvalidInput(
                        f"the upload of {upload.key} has {found} bytes in {len(parts)} parts, "
                        f"the worker said {size_bytes} bytes"
                    )
                os.fsync(fd)
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            source.rename(target)
            for folder in (target.parent, target.parent.parent):  # the folder may be new, too
                sync_folder(folder)

        await self._disk(finish)

    async def abort(self, upload: Upload) -> None:
        """Remove the temporary file."""
        await self._disk(lambda: self._upload_file(upload.handle).unlink(missing_ok=True))

    async def size(self, key: str) -> int:
        """The size of its file."""
        path = self.path(key)
        if not path.is_file():
            raise NotFound(f"the object {key} does not exist (any more)")
        return path.stat().st_size

    async def read_url(self, key: str, *, base_url: str) -> str:
        """A signed GET URL of the relay."""
        await self.size(key)
        until = self._clock.wall() + LINK_S
        return base_url + self._signer.link("GET", f"/objects/{key}", expires_at=until)

    def path(self, key: str) -> Path:
        """The file of a key; refuses keys that could leave the folder."""
        return self._root / "objects" / check_key(key)

    async def delete(self, folder: str) -> None:
        """Remove the folder."""
        path = self.path(folder)
        await self._disk(lambda: shutil.rmtree(path) if path.is_dir() else None)

    async def sweep(self, *, objects_before: float, uploads_before: float) -> int:
        """Remove old files, and the folders that are empty then."""

        def remove() -> int:
            uploads = _older(self._root / "uploads", uploads_before)
            objects = _older(self._root / "objects", objects_before)
            for each in (*uploads, *objects):
                each.unlink(missing_ok=True)
            for folder in {each.parent for each in objects}:
                with suppress(OSError):  # another attempt's object lies there
                    folder.rmdir()
            return len(uploads) + len(objects)

        return await self._disk(remove)

    async def close(self) -> None:
        """Nothing is held."""

    def _upload(self, key: str) -> Upload:
        name = hashlib.sha256(f"{check_key(key)} {self._boot}".encode()).hexdigest()[:32]
        return Upload(key=key, handle=name, part_bytes=self.part_bytes)

    def _upload_file(self, handle: str) -> Path:
        if not re.fullmatch(r"[0-9a-f]{32}", handle):
            raise NotFound(f"there is no upload {handle[:40]!r}")
        return self._root / "uploads" / handle

    async def _disk(self, work: Callable[[], _T]) -> _T:
        try:
            return await asyncio.to_thread(work)
        except OSError as error:
            raise disk_error(self._root, error) from error


class BlobFolder:
    """Request blobs too large for a row: temporary file, fsync, rename, fsync of the folder, and only then the row."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, request_id: str) -> Path:
        """Where a request's blob lies."""
        if not re.fullmatch(r"[0-9a-f]{32}", request_id):
            raise NotFound(f"there is no request {request_id[:40]!r}")
        return self._root / request_id

    def temporary(self) -> Path:
        """A new name to write to."""
        return self._root / f".{secrets.token_hex(16)}"

    def keep(self, temporary: Path, request_id: str) -> None:
        """Make a written file durable under its request's name."""
        try:
            with _open_existing(temporary) as fd:
                os.fsync(fd)
            temporary.rename(self.path(request_id))
            sync_folder(self._root)
        except OSError as error:
            raise disk_error(self._root, error) from error

    def delete(self, request_id: str) -> None:
        """Remove the blob of a request that ended."""
        self.path(request_id).unlink(missing_ok=True)

    def sweep(self, keep: set[str]) -> int:
        """At start: remove temporary files, and blobs that no open request needs; returns how many."""
        stale = [each for each in self._root.iterdir() if each.name not in keep]
        for each in stale:
            each.unlink(missing_ok=True)
        return len(stale)


def _older(folder: Path, before: float) -> list[Path]:
    return [each for each in folder.rglob("*") if each.is_file() and each.stat().st_mtime < before]


@contextmanager
def _open_existing(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def sha256_file(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_error(root: Path, error: OSError) -> StoreUnavailable:
    """What a failed write means to a person."""
    hint = (
        "free some space"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "check the folder's permissions and its disk"
    )
    return StoreUnavailable(
        f"the relay cannot write to its disk: {error.strerror}; its operator has to {hint}",
        place=str(root),
    )
