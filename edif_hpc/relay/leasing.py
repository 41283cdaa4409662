"""Leasing: which worker runs what, and what follows when a lease ends, with an answer or without.

Decisions are `domain.dispatch` and `domain.lease`; this carries them out. Every grant, outcome and release is committed
before anyone hears of it. A DONE and the grant that follows it are handed to the writer in one wake-up and share a
commit. If a commit fails, what was decided on it is taken back: the request returns to its queue, or the DONE stays
unacknowledged and the worker presents it again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from edif_hpc.clock import Clock
from edif_hpc.domain import dispatch
from edif_hpc.domain.lease import LeaseClock, LeaseEnd, spends_budget
from edif_hpc.domain.request import Failure, FailureKind, Request, RequestState, ResultRef
from edif_hpc.errors import EdifError, StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.base import ObjectStore, UploadedPart
from edif_hpc.relay.board import Board, Open, when_settled
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.seats import Holding, Worker
from edif_hpc.relay.sessions import LOG, Update
from edif_hpc.relay.telling import Telling, facts_for_meta
from edif_hpc.store.base import Grant, Store
from edif_hpc.store.writer import Writer
from edif_hpc.wire import messages as m

_log = logging.getLogger(__name__)

_UNSEEN_BEATS = 3


class Outbox(Protocol):
    """How workers are spoken to; the gateway implements it."""

    def grant(self, worker: Worker, grant: Grant, *, ahead: bool) -> bool:
        """Send a lease; False if the worker cannot be reached."""

    def tell(self, key: str, message: m.FromRelay) -> bool:
        """Send a message; False if the peer cannot be reached."""


class Leasing:
    """Grants, outcomes and lost leases."""

    def __init__(
        self,
        *,
        writer: Writer,
        board: Board,
        fleet: Fleet,
        objects: ObjectStore,
        telling: Telling,
        clock: Clock,
        leases: LeaseClock,
        failpoints: Failpoints,
    ) -> None:
        self._writer, self._board, self._fleet = writer, board, fleet
        self._objects, self._telling, self._clock = objects, telling, clock
        self._leases, self._failpoints = leases, failpoints
        self._stealing: set[str] = set()
        self._outbox: Outbox | None = None

    def attach(self, outbox: Outbox) -> None:
        """Join it to the gateway."""
        self._outbox = outbox

    def adopt(self, request: Request) -> None:
        """A lease that was open when the relay stopped: its worker has two lease lengths to present it."""
        self._leases.open(request.id, self._clock.monotonic(), grace=2.0)

    def forget(self, request_id: str) -> None:
        """The request has ended by other means."""
        self._leases.close(request_id)
        self._stealing.discard(request_id)

    # -- grants --------------------------------------------------------------------------------------------------------

    def match(self, deployment: str) -> int:
        """Grant what can be granted; returns how many leases are under way."""
        queue = self._board.queues.get(deployment)
        now, times = self._clock.monotonic(), self._fleet.times(deployment)
        workers = {each.peer.key: each for each in self._fleet.serving(deployment)}
        made = 0
        while queue:
            seat = dispatch.choose_seat(each.seat(now, times) for each in workers.values())
            waiting = queue.pop() if seat is not None else None
            if seat is None or waiting is None:
                break
            self._lease(self._board.open[waiting.id], workers[seat.peer], ahead=not seat.idle)
            made += 1
        if workers and not queue:
            self._steal(workers, now)
        return made

    def match_all(self) -> None:
        """Grant whatever can be granted: what a failed commit put back waits for this."""
        for deployment in list(self._board.queues):
            self.match(deployment)

    def _lease(self, entry: Open, worker: Worker, *, ahead: bool) -> None:
        request, now = entry.request, self._clock.wall()
        entry.busy = True
        holding = worker.leases[request.id] = Holding(
            attempt=request.attempt + 1, granted_at=self._clock.monotonic()
        )

        def failed(error: BaseException) -> None:
            entry.busy = False
            _drop(worker, request.id, holding.attempt)
            if isinstance(error, StoreUnavailable):
                self._board.enqueue(request)
            _log.error(
                "a lease was not committed",
                extra={"event": "lease_failed", "request": request.id, "reason": str(error)},
            )

        def leased(grant: Grant) -> None:
            entry.busy = False
            if self._board.open.get(request.id) is not entry:
                _drop(worker, request.id, holding.attempt)
                return
            entry.request = grant.request
            self._leases.open(request.id, self._clock.monotonic())
            self._failpoints.hit("relay.send.grant.before")
            sent = self._outbox is not None and self._outbox.grant(worker, grant, ahead=ahead)
            self._failpoints.hit("relay.send.grant.after")
            if sent:
                entry.show(self._telling.dispatched(grant.request, worker))
            else:
                self.lose(entry, LeaseEnd.RELEASED, {"cause": "the worker cannot be reached"})

        when_settled(
            self._writer.submit(lambda store: store.lease(request.id, worker.peer.key, now)),
            leased,
            failed,
        )

    def _steal(self, workers: Mapping[str, Worker], now: float) -> None:
        seats = {
            key: each.seat(now, self._fleet.times(each.peer.deployment))
            for key, each in workers.items()
        }
        prefetched = [
            dispatch.Prefetched(
                request=request_id, holder=key, holder_busy_for_s=seats[key].busy_for_s
            )
            for key, worker in workers.items()
            for request_id, holding in worker.leases.items()
            if holding.started_at is None
            and request_id not in self._stealing
            and len(worker.leases) > worker.executors
        ]
        choice = dispatch.choose_steal(seats.values(), prefetched)
        entry = self._board.open.get(choice.request) if choice is not None else None
        if choice is not None and entry is not None and not entry.busy:
            self._stealing.add(choice.request)
            self._tell(
                choice.holder, m.Steal(request=choice.request, attempt=entry.request.attempt)
            )

    # -- a worker speaks -------------------------------------------------------------------------------------------------

    def greeted(
        self, worker: Worker, held: Iterable[m.Held], *, same_process: bool
    ) -> list[m.Held]:
        """A worker said hello: which of the leases that it presents still stand. The others that it had are lost."""
        presented = {each.request: each for each in held}
        now, kept = self._clock.monotonic(), []
        for entry in self._board.holding(worker.peer.key):
            request = entry.request
            claim = presented.get(request.id)
            if claim is not None and claim.attempt == request.attempt:
                kept.append(claim)
                worker.leases[request.id] = Holding(
                    attempt=claim.attempt, granted_at=now, seen=True
                )
                self._leases.open(request.id, now)
                if claim.started:
                    self.started(worker, request.id, claim.attempt)
            else:
                end = LeaseEnd.RELEASED if same_process else LeaseEnd.WORKER_LOST
                self.lose(entry, end, {"cause": "the worker came back without it"})
        return kept

    def started(self, worker: Worker, request_id: str, attempt: int) -> None:
        """An executor has the request. Committed with the next group: no promise hangs on it."""
        entry = self._board.held(worker.peer.key, request_id, attempt)
        holding = worker.leases.get(request_id)
        if (
            entry is None
            or holding is None
            or entry.busy
            or entry.request.state is RequestState.RUNNING
        ):
            return
        now, key = self._clock.wall(), worker.peer.key
        holding.seen, holding.started_at = True, self._clock.monotonic()
        self._stealing.discard(request_id)

        def running(request: Request) -> None:
            if self._board.held(key, request_id, attempt) is entry and not entry.busy:
                entry.request = request

        def refused(error: BaseException) -> None:
            _log.info(
                "a start was not recorded",
                extra={"event": "start_refused", "request": request_id, "reason": str(error)},
            )

        when_settled(
            self._writer.submit(
                lambda store: store.start(request_id, attempt, key, now), lazy=True
            ),
            running,
            refused,
        )
        entry.show(self._telling.running(entry.request, worker))

    def renewed(self, worker: Worker, held: Iterable[m.Held]) -> list[m.Held]:
        """A heartbeat: renew what stands; returns what the worker must abandon."""
        now, stale, named = self._clock.monotonic(), [], set()
        for each in held:
            if self._board.held(worker.peer.key, each.request, each.attempt) is None:
                stale.append(each)
                continue
            named.add(each.request)
            self._leases.open(each.request, now)
            if each.request in worker.leases:
                worker.leases[each.request].seen = True
        for entry in self._board.holding(worker.peer.key):
            holding = worker.leases.get(entry.request.id)
            if holding is None or holding.seen or entry.request.id in named:
                continue
            # A grant that the worker never names was lost on its way; a heartbeat or two may have crossed it.
            if now - holding.granted_at > _UNSEEN_BEATS * self._telling.heartbeat_s:
                self.lose(entry, LeaseEnd.RELEASED, {"cause": "the grant did not arrive"})
        return stale

    def logged(self, worker: Worker, request_id: str, attempt: int, text: str) -> None:
        """A running request printed."""
        entry = self._board.held(worker.peer.key, request_id, attempt)
        if entry is not None:
            entry.show(Update(request_id=request_id, status=LOG, description=text))

    async def upload_urls(self, worker: Worker, need: m.Need, base_url: str) -> m.FromRelay:
        """URLs for the parts of a result."""
        entry = self._board.held(worker.peer.key, need.request, need.attempt)
        if entry is None:
            return m.Abandon(request=need.request, attempt=need.attempt)
        key = _object_key(need.request, need.attempt)
        if entry.upload is not None and entry.upload.key != key:
            await self._objects.abort(entry.upload)
            entry.upload = None
        if entry.upload is None:
            entry.upload = await self._objects.begin(key)
        urls = await self._objects.part_urls(
            entry.upload, need.first, need.count, base_url=base_url
        )
        return m.Parts(request=need.request, attempt=need.attempt, first=need.first, urls=urls)

    def done(self, worker: Worker, done: m.Done) -> None:
        """An attempt ended: commit its outcome, acknowledge, tell the client; its seat is free for the next grant."""
        entry = self._board.held(worker.peer.key, done.request, done.attempt)
        if entry is not None and entry.busy:
            return  # its commit is under way; the worker repeats what is not acknowledged
        if entry is not None:
            entry.busy = True
        if done.parts is not None and entry is not None:
            self._board.background(self._seal(worker, entry, done))
        else:
            self._commit_outcome(worker, entry, done)

    async def _seal(self, worker: Worker, entry: Open, done: m.Done) -> None:
        """Make an uploaded result durable before its request may be COMPLETED."""
        try:
            if entry.upload is not None:
                parts = [
                    UploadedPart(number=each.number, etag=each.etag) for each in done.parts or []
                ]
                await self._objects.complete(entry.upload, parts, done.size)
            else:
                # The relay was started anew after the upload: what was completed before is found by its key.
                await self._objects.read_url(_object_key(done.request, done.attempt), base_url="")
        except EdifError as error:
            entry.busy, entry.upload = False, None
            _log.warning(
                "an upload is not complete",
                extra={"event": "seal_failed", "request": done.request, "reason": str(error)},
            )
            if not isinstance(error, StoreUnavailable):
                self._tell(worker.peer.key, m.Reupload(request=done.request, attempt=done.attempt))
            return
        self._commit_outcome(worker, entry, done)

    def _commit_outcome(self, worker: Worker, entry: Open | None, done: m.Done) -> None:
        holding = worker.leases.pop(done.request, None)

        def failed(error: BaseException) -> None:
            if entry is not None:
                entry.busy = False
            if isinstance(error, StoreUnavailable):
                if holding is not None:
                    worker.leases[done.request] = holding
                _log.error(
                    "a result was not committed",
                    extra={"event": "done_failed", "request": done.request, "reason": str(error)},
                )
            else:
                self._acknowledge(worker, done, accepted=False, detail=str(error))

        def committed(request: Request) -> None:
            self._acknowledge(worker, done, accepted=True)
            if entry is not None:
                self._fleet.times(request.deployment).add(float(request.meta.get("runtime", 0.0)))
                self.forget(request.id)
                self._board.close(request, inline=done.inline)

        when_settled(self._writer.submit(self._outcome(worker, done)), committed, failed)
        self.match(worker.peer.deployment)

    def returned(self, worker: Worker, back: m.Return) -> None:
        """A worker gave a lease back."""
        end = LeaseEnd(back.reason) if back.reason in set(LeaseEnd) else LeaseEnd.UNKNOWN
        entry = self._board.held(worker.peer.key, back.request, back.attempt)
        if entry is not None and not entry.busy:
            self.lose(entry, end, dict(back.evidence))
        else:
            _drop(worker, back.request, back.attempt)
            self.match(worker.peer.deployment)

    # -- lost leases -----------------------------------------------------------------------------------------------------

    def gone(self, key: str, end: LeaseEnd, evidence: Mapping[str, str]) -> None:
        """A worker's process is known to be dead: its leases end now, not when they expire."""
        for entry in self._board.holding(key):
            self.lose(entry, end, evidence)

    def sweep(self, period_s: float) -> None:
        """End leases that expired. The gateway has drained its socket."""
        for request_id in self._leases.sweep(self._clock.monotonic(), period_s=period_s):
            entry = self._board.open.get(request_id)
            if entry is None or entry.request.state is RequestState.QUEUED:
                self._leases.close(request_id)
            else:
                self.lose(entry, LeaseEnd.EXPIRED, {"cause": "no heartbeat named it in time"})

    def lose(self, entry: Open, end: LeaseEnd, evidence: Mapping[str, str]) -> None:
        """A lease ended without an answer: back to the head of its user's line, or ended by the verdict."""
        request, holder, now = entry.request, entry.request.holder, self._clock.wall()
        if entry.busy or holder is None:
            return
        worker = self._fleet.workers.get(holder)
        holding = worker.leases.pop(request.id, None) if worker is not None else None
        started = request.state is RequestState.RUNNING or (
            holding is not None and holding.started_at is not None
        )
        if spends_budget(end) and not started:
            end = LeaseEnd.RELEASED  # what had not begun cannot have killed anyone
        entry.busy = True
        self.forget(request.id)

        def failed(error: BaseException) -> None:
            entry.busy = False
            self._leases.open(request.id, self._clock.monotonic())  # tried again when it expires
            _log.error(
                "a lease was not released",
                extra={"event": "release_failed", "request": request.id, "reason": str(error)},
            )

        def released(changed: Request) -> None:
            entry.busy = False
            if self._board.open.get(request.id) is not entry:
                return
            if changed.terminal:
                self._board.close(changed)
                return
            entry.request = changed
            self._board.enqueue(changed)
            if not self.match(changed.deployment):
                self._board.show_waiting(entry, why=end)

        def op(store: Store) -> Request:
            return store.release(
                request.id, request.attempt, holder, now, end=end, evidence=dict(evidence)
            )

        when_settled(self._writer.submit(op), released, failed)

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _outcome(self, worker: Worker, done: m.Done) -> Callable[[Store], Request]:
        now, key = self._clock.wall(), worker.peer.key
        meta = {**facts_for_meta(worker.facts), **done.meta, "attempt": done.attempt}
        if done.error is not None:
            kind = (
                FailureKind(done.error) if done.error in set(FailureKind) else FailureKind.ENGINE
            )
            failure = Failure(kind=kind, message=done.message)
            return lambda store: store.fail(
                done.request, done.attempt, key, now, failure=failure, meta=meta
            )
        object_key = None if done.parts is None else _object_key(done.request, done.attempt)
        inline = None if object_key is not None else (done.inline or b"")
        result = ResultRef(size_bytes=done.size if inline is None else len(inline), key=object_key)
        return lambda store: store.complete(
            done.request, done.attempt, key, now, result=result, inline=inline, meta=meta
        )

    def _acknowledge(
        self, worker: Worker, done: m.Done, *, accepted: bool, detail: str = ""
    ) -> None:
        self._failpoints.hit("relay.send.done.before")
        self._tell(
            worker.peer.key,
            m.Ack(
                request=done.request, attempt=done.attempt, accepted=accepted, detail=detail[:200]
            ),
        )
        self._failpoints.hit("relay.send.done.after")

    def _tell(self, key: str, message: m.FromRelay) -> None:
        if self._outbox is not None:
            self._outbox.tell(key, message)


def _drop(worker: Worker, request_id: str, attempt: int) -> None:
    holding = worker.leases.get(request_id)
    if holding is not None and holding.attempt == attempt:
        del worker.leases[request_id]


def _object_key(request_id: str, attempt: int) -> str:
    return f"{request_id}/{attempt}"
