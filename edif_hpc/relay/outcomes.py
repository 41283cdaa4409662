"""Outcomes: what follows when a worker says DONE.

A small result lies in the message and is written in the commit that ends its request. A large one was uploaded in
parts before; it is made durable first, and only then committed. Nobody hears of an outcome before its commit: then the
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
from edif_hpc.domain.request import Failure, FailureKind, Request, ResultRef
from edif_hpc.errors import EdifError, StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.base import ObjectStore, UploadedPart
from edif_hpc.relay.board import Board, Open, when_settled
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing, Outbox
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
        objects: ObjectStore,
        clock: Clock,
        failpoints: Failpoints,
    ) -> None:
        self._writer, self._board, self._fleet, self._leasing = writer, board, fleet, leasing
        self._objects, self._clock, self._failpoints = objects, clock, failpoints
        self._outbox: Outbox | None = None

    def attach(self, outbox: Outbox) -> None:
        """Join it to the gateway."""
        self._outbox = outbox

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
            await self._make_durable(entry, done)
        except EdifError as error:
            entry.upload = None
            _log.warning(
                "an upload is not complete",
                extra={"event": "seal_failed", "request": done.request, "reason": str(error)},
            )
            if not isinstance(error, StoreUnavailable):
                self._tell(worker, m.Reupload(request=done.request, attempt=done.attempt))
            return
        finally:
            entry.busy = False
        self._commit(worker, entry, done)

    async def _make_durable(self, entry: Open, done: m.Done) -> None:
        if entry.upload is None:
            # The relay was started anew after the upload: what was completed before is found by its key.
            await self._objects.read_url(_object_key(done.request, done.attempt), base_url="")
        else:
            parts = [UploadedPart(number=each.number, etag=each.etag) for each in done.parts or []]
            await self._objects.complete(entry.upload, parts, done.size)

    def _commit(self, worker: Worker, entry: Open | None, done: m.Done) -> None:
        key = worker.peer.key
        holding = self._fleet.let_go(key, done.request, done.attempt)
        if entry is not None:
            entry.busy = True

        def failed(error: BaseException) -> None:
            if entry is not None:
                entry.busy = False
            extra = {"event": "done_failed", "request": done.request, "reason": str(error)}
            if isinstance(error, StoreUnavailable):
                if holding is not None:
                    self._fleet.hold(key, done.request, holding)
                _log.error("a result was not committed", extra=extra)
                return
            _log.warning("a result was refused", extra=extra)
            self._acknowledge(worker, done, accepted=False, detail=str(error))
            if entry is not None:
                self._leasing.lose(entry, LeaseEnd.UNKNOWN, {"cause": str(error)[:200]})

        def committed(request: Request) -> None:
            self._acknowledge(worker, done, accepted=True)
            if entry is not None:
                self._leasing.forget(request.id)
                self._board.close(request, inline=done.inline)

        when_settled(
            self._writer.submit(self._outcome(worker, entry, holding, done)), committed, failed
        )
        self._leasing.match(worker.peer.deployment)

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
            failure = Failure(kind=kind, message=done.message)
            return lambda store: store.fail(
                done.request, done.attempt, key, now, failure=failure, meta=meta
            )
        object_key = None if done.parts is None else _object_key(done.request, done.attempt)
        size = done.size if done.inline is None else len(done.inline)
        result = ResultRef(size_bytes=size, key=object_key)
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


def _object_key(request_id: str, attempt: int) -> str:
    return f"{request_id}/{attempt}"
