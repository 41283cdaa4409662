"""Leasing: which worker runs what, and what follows when a lease ends without an answer.

Decisions are `domain.dispatch` and `domain.lease`; this carries them out. Every grant and release is committed before
anyone hears of it. If a commit fails, what was decided on it is taken back: the request returns to its queue, or the
lease stays open and is ended again when it expires. How a lease ends with an answer is `outcomes`.

A commit takes a moment, and the world moves on meanwhile: `Open.busy` says that one is under way for a request, and a
worker's record is looked up again by its key when it is over, since the worker may have greeted anew.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from edif_hpc.clock import Clock
from edif_hpc.domain import dispatch
from edif_hpc.domain.lease import LeaseClock, LeaseEnd, spends_budget
from edif_hpc.domain.request import Request, RequestState
from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.relay import lines
from edif_hpc.relay.board import Board, Open, when_settled
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.seats import Holding, Worker
from edif_hpc.relay.telling import Telling
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
    """Grants and lost leases."""

    def __init__(
        self,
        *,
        writer: Writer,
        board: Board,
        fleet: Fleet,
        telling: Telling,
        clock: Clock,
        leases: LeaseClock,
        failpoints: Failpoints,
    ) -> None:
        self._writer, self._board, self._fleet = writer, board, fleet
        self._telling, self._clock = telling, clock
        self._leases, self._failpoints = leases, failpoints
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

    # -- grants --------------------------------------------------------------------------------------------------------

    def match(self, deployment: str) -> int:
        """Grant what can be granted; returns how many leases are under way."""
        queue = self._board.queues.get(deployment)
        now, usual_s = self._clock.monotonic(), self._fleet.times(deployment).p90_s
        workers = {each.peer.key: each for each in self._fleet.serving(deployment)}
        made, longest_s = 0, self._fleet.longest_run_s(deployment)
        seats = {
            key: self._fleet.seat(each, now)
            for key, each in workers.items()
            if queue and len(each.leases) < each.window
        }
        while queue:
            chosen = dispatch.choose(queue, seats.values(), usual_s=usual_s, longest_s=longest_s)
            if chosen is None:
                break
            waiting, seat = chosen
            worker = workers[seat.peer]
            self._lease(self._board.open[waiting.id], worker, ahead=not seat.idle)
            seats[seat.peer] = self._fleet.seat(worker, now)
            made += 1
        if workers and not queue:
            self._steal(workers, now)
        if made:
            self._board.news(deployment)
        return made

    def match_all(self) -> None:
        """Grant whatever can be granted: what a failed commit put back waits for this."""
        for deployment in list(self._board.queues):
            self.match(deployment)

    def _lease(self, entry: Open, worker: Worker, *, ahead: bool) -> None:
        request, key, now = entry.request, worker.peer.key, self._clock.wall()
        attempt = request.attempt + 1
        entry.busy = True
        holding = Holding(attempt=attempt, granted_at=self._clock.monotonic())
        worker.leases[request.id] = holding

        def failed(error: BaseException) -> None:
            entry.busy = False
            self._fleet.let_go(key, request.id, attempt)
            if isinstance(error, StoreUnavailable) and self._board.open.get(request.id) is entry:
                self._board.enqueue(request)
            _log.error(
                "a lease was not committed",
                extra={"event": "lease_failed", "request": request.id, "reason": str(error)},
            )

        def leased(grant: Grant) -> None:
            entry.busy = False
            entry.request = grant.request
            self._leases.open(request.id, self._clock.monotonic())
            self._fleet.hold(key, request.id, holding)  # it may have greeted anew meanwhile
            self._failpoints.hit("relay.send.grant.before")
            sent = self._outbox is not None and self._outbox.grant(worker, grant, ahead=ahead)
            self._failpoints.hit("relay.send.grant.after")
            if sent:
                self._board.show(entry)
            else:
                self.lose(entry, LeaseEnd.RELEASED, {"cause": "the worker cannot be reached"})

        future = self._writer.submit(lambda store: store.lease(request.id, key, now))
        when_settled(future, leased, failed)

    def _steal(self, workers: Mapping[str, Worker], now: float) -> None:
        seats = {key: self._fleet.seat(each, now) for key, each in workers.items()}
        usual_s = max(self._fleet.times(each.peer.deployment).p90_s for each in workers.values())
        # A worker that had begun it, or never heard us, says nothing: after a heartbeat it is asked again.
        asked_lately = now - self._telling.heartbeat_s
        prefetched = [
            dispatch.Prefetched(
                request=request_id, holder=key, holder_busy_for_s=seats[key].busy_for_s
            )
            for key, worker in workers.items()
            for request_id, holding in worker.leases.items()
            if holding.started_at is None
            and holding.steal_asked_at < asked_lately
            and len(worker.leases) > worker.executors
        ]
        choice = dispatch.choose_steal(seats.values(), prefetched, usual_s=usual_s)
        entry = self._board.open.get(choice.request) if choice is not None else None
        if choice is not None and entry is not None and not entry.busy:
            holding = workers[choice.holder].leases[choice.request]
            holding.steal_asked_at = now
            self._tell(choice.holder, m.Steal(request=choice.request, attempt=holding.attempt))

    # -- a worker speaks -------------------------------------------------------------------------------------------------

    def greeted(self, worker: Worker, held: Iterable[m.Held], old: Worker | None) -> list[m.Held]:
        """A worker said hello: which of the leases that it presents still stand. Its others are lost.

        `old` is its record until now, if there was one. A relay that was just started has none, and cannot know whether
        this is the process that took the leases.
        """
        key, now, kept = worker.peer.key, self._clock.monotonic(), []
        presented = {(each.request, each.attempt): each for each in held}
        same_process = old is None or old.nonce == worker.nonce
        for entry in self._board.holding(key):
            claim = presented.get((entry.request.id, entry.request.attempt))
            if claim is None:
                end = LeaseEnd.RELEASED if same_process else LeaseEnd.WORKER_LOST
                self.lose(entry, end, {"cause": "the worker came back without it"})
                continue
            kept.append(claim)
            self._leases.open(claim.request, now)
            holding = Holding(attempt=claim.attempt, granted_at=now, seen=True)
            worker.leases[claim.request] = holding
            if claim.started:
                self.started(worker, claim.request, claim.attempt)
        return kept

    def started(self, worker: Worker, request_id: str, attempt: int) -> None:
        """An executor has the request. Committed with the next group: no promise hangs on it."""
        key = worker.peer.key
        entry = self._board.held(key, request_id, attempt)
        holding = worker.leases.get(request_id)
        if entry is None or holding is None or entry.busy:
            return
        entry.begun = attempt
        if holding.started_at is None:
            holding.seen, holding.started_at = True, self._clock.monotonic()
        if entry.request.state is RequestState.RUNNING:
            return
        now = self._clock.wall()

        def running(request: Request) -> None:
            if self._board.held(key, request_id, attempt) is entry and not entry.busy:
                entry.request = request

        def refused(error: BaseException) -> None:
            _log.info(
                "a start was not recorded",
                extra={"event": "start_refused", "request": request_id, "reason": str(error)},
            )

        def op(store: Store) -> Request:
            return store.start(request_id, attempt, key, now)

        when_settled(self._writer.submit(op, lazy=True), running, refused)
        self._board.show(entry)

    def renewed(self, worker: Worker, held: Iterable[m.Held]) -> list[m.Held]:
        """A heartbeat: renew what stands; returns what the worker must abandon."""
        key, now, stale, named = worker.peer.key, self._clock.monotonic(), [], set()
        for each in held:
            if self._board.held(key, each.request, each.attempt) is None:
                stale.append(each)
                continue
            named.add(each.request)
            self._leases.open(each.request, now)
            if each.request in worker.leases:
                holding = worker.leases[each.request]
                holding.seen, holding.sent, holding.size = True, each.sent, each.size
        for request_id, holding in list(worker.leases.items()):
            if request_id not in named:
                self._unnamed(worker, request_id, holding, now)
        return stale

    def _unnamed(self, worker: Worker, request_id: str, holding: Holding, now: float) -> None:
        """A lease that its worker's heartbeat did not name."""
        entry = self._board.open.get(request_id)
        if entry is not None and entry.busy:
            return  # being committed
        if self._board.held(worker.peer.key, request_id, holding.attempt) is None:
            del worker.leases[request_id]  # it has ended, and the worker knows
            return
        # Its grant was lost on its way; but a heartbeat or two may have crossed it.
        unseen_s = 0.0 if holding.seen else now - holding.granted_at
        if entry is not None and unseen_s > _UNSEEN_BEATS * self._telling.heartbeat_s:
            self.lose(entry, LeaseEnd.RELEASED, {"cause": "the grant did not arrive"})

    def logged(self, worker: Worker, request_id: str, attempt: int, text: str) -> None:
        """A running request printed."""
        entry = self._board.held(worker.peer.key, request_id, attempt)
        if entry is not None:
            entry.log(text)

    def returned(self, worker: Worker, back: m.Return) -> None:
        """A worker gave a lease back."""
        end = LeaseEnd(back.reason) if back.reason in set(LeaseEnd) else LeaseEnd.UNKNOWN
        entry = self._board.held(worker.peer.key, back.request, back.attempt)
        if entry is not None and not entry.busy:
            # Before the request is queued again: this worker is not the next one to get it.
            worker.pause = worker.pause.after(end, self._clock.monotonic())
            self.lose(entry, end, dict(back.evidence))
        else:
            self._fleet.let_go(worker.peer.key, back.request, back.attempt)
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
        node = self._fleet.node(holder)
        self._cut(entry, self._fleet.let_go(holder, request.id, request.attempt))
        if spends_budget(end) and self.waits(entry):
            end = LeaseEnd.RELEASED  # what had not begun cannot have killed anyone
        entry.busy = True
        self.forget(request.id)

        def failed(error: BaseException) -> None:
            entry.busy = False
            if self._board.open.get(request.id) is entry:
                self._leases.open(request.id, self._clock.monotonic())  # tried again at its expiry
            _log.error(
                "a lease was not released",
                extra={"event": "release_failed", "request": request.id, "reason": str(error)},
            )

        def released(changed: Request) -> None:
            entry.busy = False
            if self._board.open.get(request.id) is entry:
                entry.again = lines.ended(end, node=node)
                self._after(entry, changed)

        def op(store: Store) -> Request:
            return store.release(
                request.id, request.attempt, holder, now, end=end, evidence=dict(evidence)
            )

        when_settled(self._writer.submit(op), released, failed)

    def _cut(self, entry: Open, held: Holding | None) -> None:
        """It had run so long: its next worker has to live longer."""
        if held is not None and held.started_at is not None:
            entry.cut_s = max(entry.cut_s, self._clock.monotonic() - held.started_at)

    def _after(self, entry: Open, changed: Request) -> None:
        if changed.terminal:
            self._board.close(changed)
            return
        entry.request = changed
        self._board.enqueue(changed)
        if not self.match(changed.deployment):
            self._board.show(entry)

    def waits(self, entry: Open) -> bool:
        """Whether it has not begun: it is queued, or a worker has it and has not started."""
        request = entry.request
        unstarted = request.state is RequestState.DISPATCHED and entry.begun != request.attempt
        return unstarted or request.state is RequestState.QUEUED

    # -- inside ----------------------------------------------------------------------------------------------------------

    def _tell(self, key: str, message: m.FromRelay) -> None:
        if self._outbox is not None:
            self._outbox.tell(key, message)
