"""The board: all open requests as this process knows them, their queues, and who listens.

Memory only. The rows are the truth; the board is their image plus what has no row: the session that listens, the upload
under way, and whether a commit that changes the request is in flight (`busy`).

Who listens is never left in silence: each change of a request is told at once, and what lasts is told again every `TELL_S`
by the scheduler's beat, with how far it is. Requests to which nobody listens cost the beat nothing.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain.dispatch import FairQueue, Waiting
from edif_hpc.domain.request import LEASED, Provision, Request, RequestState, shown_state
from edif_hpc.objects.base import ObjectStore, Upload
from edif_hpc.objects.directory import INLINE_BLOB_BYTES, BlobFolder
from edif_hpc.relay import lines
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.intake import Holdings
from edif_hpc.relay.lines import Ahead
from edif_hpc.relay.outlook import Outlook
from edif_hpc.relay.sessions import LOG, Session, Update
from edif_hpc.relay.telling import Telling

_log = logging.getLogger(__name__)

#: What lasts is told again after so long; with the beat and some lateness, that is less than 5 s.
TELL_S = 3.0
#: A change of the fleet or the queue is told to those who wait, but not more often than this.
NEWS_S = 1.0


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
    again: str = ""  #: how the attempt before ended, in words
    cut_s: float = 0.0  #: the longest that it had run when a worker was lost under it
    told_at: float = -math.inf  #: when its client was told last, monotonic

    @property
    def runs(self) -> bool:
        """Whether an executor has it."""
        request = self.request
        return request.state in LEASED and (
            request.state is RequestState.RUNNING or self.begun == request.attempt
        )

    def log(self, text: str) -> None:
        """Pass on what it printed, if a client listens."""
        if self.session is not None:
            self.session.push(Update(request_id=self.request.id, status=LOG, description=text))


class Board:
    """All open requests."""

    def __init__(
        self,
        *,
        fleet: Fleet,
        outlook: Outlook,
        telling: Telling,
        objects: ObjectStore,
        blobs: BlobFolder,
        clock: Clock,
    ) -> None:
        self.open: dict[str, Open] = {}
        self.queues: dict[str, FairQueue] = {}
        self.holdings = Holdings()
        self._listening: dict[str, Open] = {}
        self._news: set[str] = set()  # deployments that changed since the last beat
        self._fleet, self._outlook, self._telling = fleet, outlook, telling
        self._objects, self._blobs, self._clock = objects, blobs, clock
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, request: Request, session: Session | None = None) -> Open:
        """A request was accepted, or read at the start."""
        entry = self.open[request.id] = Open(request=request, session=session)
        self.holdings.add(request)
        if session is not None:
            session.requests.add(request.id)
            self._listening[request.id] = entry
        if request.state is RequestState.QUEUED:
            self.enqueue(request)
        return entry

    def enqueue(self, request: Request) -> None:
        """It waits; one that waited before returns to the head of its user's line."""
        queue = self.queues.setdefault(request.deployment, FairQueue())
        entry = self.open.get(request.id)
        waiting = Waiting(
            id=request.id,
            seq=request.seq,
            owner=request.owner,
            wall_s=request.limits.wall_s,
            cut_s=entry.cut_s if entry is not None else 0.0,
        )
        queue.push(waiting)

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

    # -- what is told --------------------------------------------------------------------------------------------------

    def ahead(self, request: Request) -> Ahead:
        """What a queued request waits behind."""
        queue = self.queues.get(request.deployment)
        if queue is None or request.id not in queue:
            return Ahead()  # it does not wait, or is being granted
        line = self._line(request.deployment)
        return next(ahead for waiting, ahead in line if waiting.id == request.id)

    def update(self, request: Request) -> Update:
        """What to say of a request that has not ended."""
        entry = self.open.get(request.id) or Open(request=request)
        return self._update(entry, None)

    def show(self, entry: Open) -> None:
        """Tell a listening client what its request does now."""
        self._show(entry, None)

    def news(self, deployment: str) -> None:
        """Those who wait for a deployment are told anew by the next beat."""
        self._news.add(deployment)

    def tell(self) -> None:
        """Tell every listening client whose request was not spoken of for `TELL_S`, or of which there is news."""
        now = self._clock.monotonic()
        queued: dict[str, dict[str, Open]] = {}
        for key, entry in list(self._listening.items()):
            if entry.session is None:
                del self._listening[key]
            elif not self._due(entry, now):
                continue
            elif entry.request.state is RequestState.QUEUED:
                queued.setdefault(entry.request.deployment, {})[key] = entry
            else:
                self._show(entry, None)
        self._news.clear()
        for deployment, due in queued.items():
            self._tell_line(deployment, due)

    def _due(self, entry: Open, now: float) -> bool:
        waits_for_news = entry.request.state is RequestState.QUEUED
        news = waits_for_news and entry.request.deployment in self._news
        return now - entry.told_at >= (NEWS_S if news else TELL_S)

    def _tell_line(self, deployment: str, due: dict[str, Open]) -> None:
        """One walk along a queue, as far as somebody listens."""
        for waiting, ahead in self._line(deployment):
            entry = due.pop(waiting.id, None)
            if entry is not None:
                self._show(entry, ahead)
            if not due:
                return
        for entry in due.values():  # their grants are being committed
            self._show(entry, Ahead())

    def _line(self, deployment: str) -> Iterator[tuple[Waiting, Ahead]]:
        queue = self.queues.get(deployment)
        order = queue.order() if queue is not None else []
        return self._outlook.ahead(deployment, order, self._owner)

    def _owner(self, request_id: str) -> str:
        entry = self.open.get(request_id)
        return entry.request.owner if entry is not None else ""

    def _show(self, entry: Open, ahead: Ahead | None) -> None:
        if entry.session is not None:
            entry.session.push(self._update(entry, ahead))
            entry.told_at = self._clock.monotonic()

    def _update(self, entry: Open, ahead: Ahead | None) -> Update:
        request = entry.request
        if request.state in LEASED:
            held = self._outlook.held(request, begun=entry.runs, again=entry.again)
            state = RequestState.RUNNING if entry.runs else RequestState.DISPATCHED
            return self._telling.open(request, state, lines.held(held))
        ahead = self.ahead(request) if ahead is None else ahead
        provision, why = self._fleet.provision(request.deployment)
        if provision is Provision.WARM:
            line = lines.queued(ahead, entry.again)
        else:
            line = lines.provisioning(why, ahead, entry.again)
        return self._telling.open(request, shown_state(request.state, provision), line)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self, request: Request, *, inline: bytes | None = None) -> None:
        """A request has ended, durably: forget it, tell its client, throw its blob away."""
        entry = self.open.pop(request.id, None)
        if entry is None:
            return
        self.holdings.remove(request)
        self._listening.pop(request.id, None)
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
