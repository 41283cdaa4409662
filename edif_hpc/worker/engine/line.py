"""Jobs that wait for an executor, and executors that wait for a job.

Who waits longest is served first. On a device one job runs at a time: an executor that is ready beside it (`shared`) is given
away when the one before is gone, and not when its job has ended, because until then it could still write into what both have.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from edif_hpc.worker.engine.seat import Seat


class Line:
    """The ready executors and those who want one."""

    def __init__(self, *, alone: bool) -> None:
        """With `alone`, no two executors have a job at once."""
        self.ready: deque[Seat] = deque()
        self._alone = alone
        self._given: set[Seat] = set()
        self._waiting: deque[asyncio.Future[Seat | None]] = deque()

    @property
    def held_up(self) -> bool:
        """Whether whoever is ready has to wait until another one is gone."""
        return self._alone and bool(self._given)

    async def take(self, order_more: Callable[[], None]) -> Seat | None:
        """Return an executor once there is one, or `None` if there will be none; `order_more` is called if none is left."""
        waiter: asyncio.Future[Seat | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._serve()
        if not self.ready:
            order_more()
        try:
            return await waiter
        except asyncio.CancelledError:
            given = waiter.result() if waiter.done() and not waiter.cancelled() else None
            if given is not None:
                self._given.discard(given)
                self.offer(given)
            raise

    def offer(self, seat: Seat) -> None:
        """Take one that is ready."""
        self.ready.append(seat)
        self._serve()

    def gone(self, seat: Seat) -> bool:
        """Take note that an executor is no more; return whether it was lost, that is, ready without a job."""
        lost = seat in self.ready
        if lost:
            self.ready.remove(seat)
        self._given.discard(seat)
        self._serve()
        return lost

    def close(self) -> None:
        """Let all who wait know that there will be none."""
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    def _serve(self) -> None:
        while self.ready and self._waiting and not self.held_up:
            waiter = self._waiting.popleft()
            if not waiter.done():
                seat = self.ready.popleft()
                self._given.add(seat)
                waiter.set_result(seat)
