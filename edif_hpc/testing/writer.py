"""A writer without a thread, for tests that decide when a group is committed, and whether it is.

Everything but the thread is the real `store.writer.Writer`: what one iteration of the loop submits
is one group, its operations have savepoints, futures are told after the commit. Here the group is
committed on the loop: at once when it would be handed to the thread or, after `hold`, when the test
says `commit`. So a test with a manual clock is deterministic, commits included.

    writer.hold()                # from now on groups wait
    writer.commit(failing=True)  # the disk is full: all that waits fails, nothing of it happened
"""

from __future__ import annotations

import asyncio

from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.store.base import Store
from edif_hpc.store.writer import Job, Writer


class SteppedWriter(Writer):
    """Commits on the event loop that it was started on."""

    def __init__(self, store: Store, failpoints: Failpoints | None = None) -> None:
        super().__init__(store, failpoints)
        self.groups = 0  #: how many were committed, or failed to be
        self._held = False

    def start(self) -> None:
        """Answer to the running loop; there is no thread to start."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._died = self._loop.create_future()

    async def stop(self) -> None:
        """Commit what is waiting, and refuse the rest."""
        if self._ended is None:
            return
        self.release()
        if self._refusal is None:
            self._refusal = StoreUnavailable("the store's writer has stopped; the relay is ending")
        self._finish()

    def crash(self) -> None:
        """Be gone, with what was not committed: nobody is told anything, nobody may submit."""
        self._take()
        self._refusal = StoreUnavailable("the process of this writer is gone")

    def hold(self) -> None:
        """Let operations wait for `commit`."""
        self._held = True

    def release(self) -> None:
        """Commit what waits, and from now on each group at once."""
        self._held = False
        self.commit()

    @property
    def waiting(self) -> int:
        """How many operations are not committed."""
        return len(self._waiting)

    def commit(self, *, failing: bool = False) -> None:
        """Commit all that was submitted, as one group; or fail its commit, as a full disk does."""
        group = self._take()
        if not group:
            return
        self.groups += 1
        if failing:
            last = self._job(_full_disk)
            last.future.cancel()  # nobody waits for it
            group.append(last)
        try:
            outcomes = self._commit(group)
        except Exception as fault:  # noqa: BLE001 - the thread's edge in the real writer
            self._bury(fault, group)
        else:
            for outcome in outcomes:
                outcome.tell()

    def _flush(self) -> None:
        self._flushing = None
        if not self._held:
            self.commit()

    def _take(self) -> list[Job]:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        group, self._waiting = self._waiting, []
        return group


def _full_disk(store: Store) -> None:  # noqa: ARG001 - an operation
    raise StoreUnavailable("the disk is full")
