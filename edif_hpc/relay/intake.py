"""What one person may put into the relay: requests that have not ended, their bytes, bodies under way, and disk.

The queue is shared, so nobody may fill it. All of this is looked at before a body is read, by the length that its headers
tell, and the disk again with each piece that is written. The disk's last part is kept for what was promised already: results
and the queue's own rows still fit when new requests are turned away.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.domain.pacing import Shares
from edif_hpc.domain.request import Request
from edif_hpc.errors import StoreUnavailable, TooMany
from edif_hpc.settings import RelaySettings

_MOST_KEPT = (
    20  # of the disk at most one part in so many is kept free: a small disk must be of use, too
)


@dataclass(kw_only=True)
class Holdings:
    """Requests that have not ended, and their bytes, by owner."""

    _requests: Counter[str] = field(default_factory=Counter)
    _bytes: Counter[str] = field(default_factory=Counter)

    def add(self, request: Request) -> None:
        """One was accepted."""
        self._requests[request.owner] += 1
        self._bytes[request.owner] += request.blob_bytes

    def remove(self, request: Request) -> None:
        """One has ended."""
        self._requests[request.owner] -= 1
        self._bytes[request.owner] -= request.blob_bytes
        if not self._requests[request.owner]:
            del self._requests[request.owner], self._bytes[request.owner]

    def of(self, owner: str) -> tuple[int, int]:
        """How many requests of one owner, and how many bytes."""
        return self._requests[owner], self._bytes[owner]


class Intake:
    """Who may send a request now. `held` tells what an owner has here already; `folder` lies on the disk that is watched."""

    def __init__(
        self, settings: RelaySettings, *, held: Callable[[str], tuple[int, int]], folder: Path
    ) -> None:
        self._settings, self._held, self._folder = settings, held, folder
        self._uploads = Shares(limit=settings.max_uploads_per_token)

    @contextmanager
    def admit(self, owner: str, told_bytes: int) -> Iterator[None]:
        """While one body is read. `told_bytes` is its length, as far as it is told."""
        most = self._settings.max_open_requests
        if self._held(owner)[0] + self._uploads.held(owner) >= most:
            raise TooMany(
                f"{most} requests of your token have not ended yet (max_open_requests); wait for some, or cancel them "
                "(edif-hpc request cancel)"
            )
        self.check_bytes(owner, told_bytes)
        self.check_room(told_bytes)
        limit = self._uploads.limit
        text = f"{limit} requests of your token are being sent at this moment (max_uploads_per_token); send fewer at a time"
        with self._uploads.hold(owner, text):
            yield

    def check_bytes(self, owner: str, more: int) -> None:
        """Raise `TooMany` if so many bytes more would be too many for one owner."""
        most = self._settings.max_open_bytes
        if self._held(owner)[1] + more > most:
            raise TooMany(
                f"the requests of your token that have not ended would have more than {most} bytes (max_open_bytes); wait "
                "for some, or keep large tensors out of them"
            )

    def check_room(self, more: int) -> None:
        """Raise `StoreUnavailable` if so many bytes more would eat into what the disk keeps free."""
        disk = os.statvfs(self._folder)
        free, whole = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
        if free - more < min(self._settings.min_free_bytes, whole // _MOST_KEPT):
            raise StoreUnavailable(
                "the relay's disk is nearly full, and the rest of it is kept for results (min_free_bytes); try again "
                "later, and tell the relay's operator",
                place=str(self._folder),
            )
