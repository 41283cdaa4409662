"""The board: all open requests as this process knows them, their queues, and who listens.

Memory only. The rows are the truth; the board is their image plus what has no row: the session that listens, the upload
under way, and whether a commit that changes the request is in flight (`busy`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.domain.dispatch import FairQueue, Waiting
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.request import Request, RequestState
from edif_hpc.objects.base import ObjectStore, Upload
from edif_hpc.objects.directory import INLINE_BLOB_BYTES, BlobFolder
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.sessions import Session, Update
from edif_hpc.relay.telling import Telling

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Open:
    """A request that has not ended."""

    request: Request
    session: Session | None = None
    orphaned_at: float | None = None  #: when its client's socket closed, monotonic
    upload: Upload | None = None
    uploading: asyncio.Lock = field(default_factory=asyncio.Lock)
    unsealed_since: float | None = None  #: when sealing its result first failed, monotonic
    busy: bool = False  #: an operation that changes its state is being committed
    begun: int = (
        0  #: the newest attempt that an executor was given; its row may say so a moment later
    )

    def show(self, update: Update) -> None:
        """Tell the client, if one listens."""
        if self.session is not None:
            self.session.push(update)


class Board:
    """All open requests."""

    def __init__(
        self, *, fleet: Fleet, telling: Telling, objects: ObjectStore, blobs: BlobFolder
    ) -> None:
        self.open: dict[str, Open] = {}
        self.queues: dict[str, FairQueue] = {}
        self._fleet, self._telling = fleet, telling
        self._objects, self._blobs = objects, blobs
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, request: Request, session: Session | None = None) -> Open:
        """A request was accepted, or read at the start."""
        entry = self.open[request.id] = Open(request=request, session=session)
        if session is not None:
            session.requests.add(request.id)
        if request.state is RequestState.QUEUED:
            self.enqueue(request)
        return entry

    def enqueue(self, request: Request) -> None:
        """It waits; one that waited before returns to the head of its user's line."""
        queue = self.queues.setdefault(request.deployment, FairQueue())
        queue.push(Waiting(id=request.id, seq=request.seq, owner=request.owner))

    def held(self, key: str, request_id: str, attempt: int) -> Open | None:
        """The entry, if this peer holds this attempt of it."""
        entry = self.open.get(request_id)
        if entry is None or entry.request.holder != key or entry.request.attempt != attempt:
            return None
        return entry

    def holding(self, key: str) -> list[Open]:
        """All that a peer holds."""
        return [
            each
            for each in self.open.values()
            if each.request.holder == key and each.request.state is not RequestState.QUEUED
        ]

    def position(self, request: Request) -> int:
        """Place in the queue, from 1; 0 for one that does not wait."""
        queue = self.queues.get(request.deployment)
        if queue is None or request.id not in queue:
            return 0
        return next(
            place for place, each in enumerate(queue.order(), start=1) if each.id == request.id
        )

    def waiting_update(
        self, request: Request, *, position: int | None = None, why: LeaseEnd | None = None
    ) -> Update:
        """What to say of a request that has not ended."""
        place = self.position(request) if position is None else position
        return self._telling.waiting(
            request, place, self._fleet.provision(request.deployment), why=why
        )

    def show_waiting(self, entry: Open, *, why: LeaseEnd | None = None) -> None:
        """Tell a listening client what its queued request waits for."""
        if entry.session is not None and entry.request.state is RequestState.QUEUED:
            entry.show(self.waiting_update(entry.request, why=why))

    def show_positions(self) -> None:
        """Tell every listening client where its queued request stands."""
        for queue in self.queues.values():
            for position, waiting in enumerate(queue.order(), start=1):
                entry = self.open[waiting.id]
                if entry.session is not None and entry.request.state is RequestState.QUEUED:
                    entry.show(self.waiting_update(entry.request, position=position))

    def close(self, request: Request, *, inline: bytes | None = None) -> None:
        """A request has ended, durably: forget it, tell its client, throw its blob away."""
        entry = self.open.pop(request.id, None)
        if entry is None:
            return
        queue = self.queues.get(request.deployment)
        if queue is not None:
            queue.remove(request.id)
        self._telling.canonical(request)
        if entry.session is not None or entry.upload is not None or _has_file(request):
            self.background(self._finish(entry, request, inline))

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work that nobody awaits; its failure is logged."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    async def settle(self) -> None:
        """Wait until nothing runs in the background."""
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    async def _finish(self, entry: Open, request: Request, inline: bytes | None) -> None:
        session = entry.session
        if session is not None:
            session.requests.discard(request.id)
            session.push(await self._telling.ended(request, session.base_url, inline=inline))
        if _has_file(request):
            await asyncio.to_thread(self._blobs.delete, request.id)
        kept = request.result.key if request.result is not None else None
        if entry.upload is not None and entry.upload.key != kept:
            await self._objects.abort(entry.upload)

    def _reap(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error(
                "work in the background failed",
                exc_info=task.exception(),
                extra={"event": "background_failed"},
            )


def _has_file(request: Request) -> bool:
    """Whether its blob lies in the blob folder."""
    return request.blob_bytes > INLINE_BLOB_BYTES


def when_settled(
    future: asyncio.Future[Any],
    done: Callable[[Any], None],
    failed: Callable[[BaseException], None],
) -> None:
    """Call one of two functions on the loop when a write is settled."""

    def callback(settled: asyncio.Future[Any]) -> None:
        error = settled.exception()
        if error is None:
            done(settled.result())
        else:
            failed(error)

    future.add_done_callback(callback)


def ignored(error: BaseException) -> None:
    """For `when_settled`, where the failure is somebody else's to hear."""
