"""Outcomes: what follows when a worker says DONE.

A small result lies in the message and is written in the commit that ends its request. A large one was uploaded in
parts before; it is made durable first (`sealing`), and only then committed. Nobody hears of an outcome before its commit: then the
worker may forget the lease, and the client is told. If the commit fails, nothing is acknowledged, so the worker keeps
the result and presents it again.

A DONE of an attempt that lost its lease is refused. One that is well-formed and still cannot be stored (its `meta` is
no JSON, say) would be repeated for ever; it ends the attempt as an unknown cause, which the crash budget bounds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.pause import Pause
from edif_hpc.domain.request import Failure, FailureKind, Request, ResultRef
from edif_hpc.errors import StoreUnavailable, Unavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.relay.board import Board, Open, when_settled
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing, Outbox
from edif_hpc.relay.sealing import Sealing, object_key
from edif_hpc.relay.seats import Holding, Worker
from edif_hpc.relay.telling import facts_for_meta
from edif_hpc.store.base import Store
from edif_hpc.store.writer import Writer
from edif_hpc.wire import messages as m

_log = logging.getLogger(__name__)


class Outcomes:
    """Uploads and DONEs."""

    def __init__(
        self,
        *,
        writer: Writer,
        board: Board,
        fleet: Fleet,
        leasing: Leasing,
        sealing: Sealing,
        clock: Clock,
        failpoints: Failpoints,
    ) -> None:
        self._writer, self._board, self._fleet, self._leasing = writer, board, fleet, leasing
        self._sealing, self._clock, self._failpoints = sealing, clock, failpoints
        self._outbox: Outbox | None = None

    def attach(self, outbox: Outbox) -> None:
        """Join it to the gateway."""
        self._outbox = outbox

    async def upload_urls(self, worker: Worker, need: m.Need, base_url: str) -> m.FromRelay:
        """URLs for the parts of a result."""
        entry = self._board.held(worker.peer.key, need.request, need.attempt)
        if entry is None:
            return m.Abandon(request=need.request, attempt=need.attempt)
        return await self._sealing.urls(entry, need, base_url)

    def done(self, worker: Worker, done: m.Done) -> None:
        """An attempt ended: commit its outcome, acknowledge, tell the client.

        Its seat is free for the next grant, which shares the commit.
        """
        entry = self._board.held(worker.peer.key, done.request, done.attempt)
        if entry is not None and entry.busy:
            return  # its commit is under way; the worker repeats what is not acknowledged
        if done.parts is not None and entry is not None:
            self._board.background(self._seal(worker, entry, done))
        else:
            self._commit(worker, entry, done)

    async def _seal(self, worker: Worker, entry: Open, done: m.Done) -> None:
        entry.busy = True
        try:
            instead = await self._sealing.seal(entry, done)
        except Unavailable:
            return  # not acknowledged, so it comes again
        finally:
            entry.busy = False
        if isinstance(instead, m.Reupload):
            self._tell(worker, instead)
        else:
            self._commit(worker, entry, done if instead is None else _failed(done, instead))

    def _commit(self, worker: Worker, entry: Open | None, done: m.Done) -> None:
        holding = self._fleet.let_go(worker.peer.key, done.request, done.attempt)
        op = self._outcome(worker, entry, holding, done)
        if entry is not None:
            entry.busy = True

        def failed(error: BaseException) -> None:
            if entry is not None:
                entry.busy = False
            self._not_committed(worker, entry, holding, done, error)

        def committed(request: Request) -> None:
            worker.pause = Pause()
            self._acknowledge(worker, done, accepted=True)
            if entry is not None:
                self._leasing.forget(request.id)
                self._board.close(request, inline=done.inline)

        when_settled(self._writer.submit(op), committed, failed)
        self._leasing.match(worker.peer.deployment)

    def _not_committed(
        self,
        worker: Worker,
        entry: Open | None,
        holding: Holding | None,
        done: m.Done,
        error: BaseException,
    ) -> None:
        _log.error(
            "a result was not committed",
            extra={"event": "done_failed", "request": done.request, "reason": str(error)},
        )
        if holding is not None:
            self._fleet.hold(worker.peer.key, done.request, holding)
        if isinstance(error, StoreUnavailable):
            return  # not acknowledged, so it comes again
        self._acknowledge(worker, done, accepted=False, detail=str(error))
        if entry is not None and self._board.open.get(done.request) is entry:
            self._leasing.lose(entry, LeaseEnd.UNKNOWN, {"cause": str(error)[:200]})

    def _outcome(
        self, worker: Worker, entry: Open | None, holding: Holding | None, done: m.Done
    ) -> Callable[[Store], Request]:
        now, key = self._clock.wall(), worker.peer.key
        meta = {**done.meta, **facts_for_meta(worker.facts), "attempt": done.attempt}
        if entry is not None and holding is not None and holding.started_at is not None:
            ran_s = self._clock.monotonic() - holding.started_at
            self._fleet.times(worker.peer.deployment).add(ran_s)
            meta["queued_s"] = round(max(0.0, now - ran_s - entry.request.accepted_at), 3)
        if done.error is not None:
            kind = (
                FailureKind(done.error) if done.error in set(FailureKind) else FailureKind.ENGINE
            )
            details = meta.pop("error", {})
            failure = Failure(
                kind=kind,
                message=done.message,
                details=details if isinstance(details, dict) else {},
            )
            return lambda store: store.fail(
                done.request, done.attempt, key, now, failure=failure, meta=meta
            )
        key_or_none = None if done.parts is None else object_key(done.request, done.attempt)
        size = done.size if done.inline is None else len(done.inline)
        result = ResultRef(size_bytes=size, key=key_or_none)
        return lambda store: store.complete(
            done.request, done.attempt, key, now, result=result, inline=done.inline, meta=meta
        )

    def _acknowledge(
        self, worker: Worker, done: m.Done, *, accepted: bool, detail: str = ""
    ) -> None:
        self._failpoints.hit("relay.send.done.before")
        ack = m.Ack(
            request=done.request, attempt=done.attempt, accepted=accepted, detail=detail[:200]
        )
        self._tell(worker, ack)
        self._failpoints.hit("relay.send.done.after")

    def _tell(self, worker: Worker, message: m.FromRelay) -> None:
        if self._outbox is not None:
            self._outbox.tell(worker.peer.key, message)


def _failed(done: m.Done, failure: Failure) -> m.Done:
    return m.Done(
        request=done.request,
        attempt=done.attempt,
        error=str(failure.kind),
        message=failure.message,
        meta=done.meta,
    )
