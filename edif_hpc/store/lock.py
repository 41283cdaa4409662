"""One relay per data directory, kept by an advisory lock on a file.

Two relays on one queue would hand out the same request twice without ever failing. `flock` ends
with the process that took it, however that dies, so a lock left behind is not possible; the
process id in the file only serves the message.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from edif_hpc.errors import StoreUnavailable


class DirectoryLock:
    """The right of this process to write into `folder`."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "relay.lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock, or raise `StoreUnavailable` that names who has it."""
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise StoreUnavailable(
                f"the data directory {self._path.parent} cannot be written ({error.strerror}); "
                "create it, make it writable for this user, or choose another data directory"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise StoreUnavailable(self._refusal(error, holder)) from error
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _refusal(self, error: OSError, holder: str) -> str:
        if isinstance(error, BlockingIOError):
            return (
                f"the data directory {self._path.parent} is in use by process {holder}; stop that "
                "relay, or choose another data directory"
            )
        return (
            f"the data directory {self._path.parent} cannot be locked ({error.strerror}); put it "
            "on a local disk with free space"
        )
