"""The broker: what clients and operators may do with requests.

Acceptance is the promise: when `accept` returns, bytes and row are on disk, and the request will end with its result or
with an honest error. What workers do with it is `leasing`; what is known of it in memory is the `board`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain.request import Failure, FailureKind, NewRequest, Request, RequestState
from edif_hpc.errors import NotFound, TransitionRefused
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.base import ObjectStore
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.relay import lines
from edif_hpc.relay.board import Board, ignored, when_settled
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing, Outbox
from edif_hpc.relay.sessions import Session, Update
from edif_hpc.relay.telling import Telling
from edif_hpc.store.base import Store
from edif_hpc.store.writer import Writer
from edif_hpc.wire import messages as m

_RETENTION_BATCH = 200


class Broker:
    """The use cases of a request."""

    def __init__(
        self,
        *,
        writer: Writer,
        store: Store,
        board: Board,
        leasing: Leasing,
        fleet: Fleet,
        objects: ObjectStore,
        blobs: BlobFolder,
        telling: Telling,
        clock: Clock,
        failpoints: Failpoints,
    ) -> None:
        self._writer, self._store, self._board, self._leasing = writer, store, board, leasing
        self._fleet, self._objects, self._blobs = fleet, objects, blobs
        self._telling, self._clock, self._failpoints = telling, clock, failpoints
        self._outbox: Outbox | None = None

    def attach(self, outbox: Outbox) -> None:
        """Join it to the gateway."""
        self._outbox = outbox

    def restore(self) -> None:
        """Read the open requests at the start."""
        for request in self._store.open_requests():
            entry = self._board.add(request)
            if request.state is not RequestState.QUEUED:
                self._leasing.adopt(request)
            if request.attempt:
                ends = [each.end for each in self._store.attempts(request.id) if each.end]
                entry.again = lines.ended(ends[-1]) if ends else ""
        self._blobs.sweep(set(self._board.open))

    # -- clients -------------------------------------------------------------------------------------------------------

    async def accept(
        self, new: NewRequest, blob: bytes | Path, session: Session | None
    ) -> Request:
        """Commit a request. A blob above the inline size comes as a temporary file in the blob folder."""
        inline = None if isinstance(blob, Path) else blob
        if isinstance(blob, Path):
            self._failpoints.hit("store.blob.written")
            await asyncio.to_thread(self._blobs.keep, blob, new.id)
            self._failpoints.hit("store.blob.renamed")
        future = self._writer.submit(lambda store: store.accept(new, inline))
        # What is committed is on the board, even if the caller has given up meanwhile.
        when_settled(future, lambda request: self._accepted(request, session), ignored)
        return await asyncio.shield(future)

    def _accepted(self, request: Request, session: Session | None) -> None:
        entry = self._board.add(request, session)
        if session is not None and session.closed:
            self.session_closed(session)
        if not self._leasing.match(request.deployment):
            self._board.show(entry)

    def holdings(self, owner: str) -> tuple[int, int]:
        """How many requests of one owner have not ended, and their bytes."""
        return self._board.holdings.of(owner)

    async def view(self, request_id: str, base_url: str) -> tuple[Request, Update]:
        """A request and what a poll shows of it."""
        entry = self._board.open.get(request_id)
        if entry is not None:
            return entry.request, self._board.update(entry.request)
        request = await asyncio.to_thread(self._store.get, request_id)
        if request is None:
            raise NotFound(f"there is no request {request_id}")
        if not request.terminal:  # accepted this instant, not on the board yet
            return request, self._board.update(request)
        return request, await self._telling.ended(request, base_url)

    async def cancel(self, request_id: str, *, by: str) -> Request:
        """End a request that has not ended; one that has is returned as it is."""
        return await self.end(
            request_id, Failure(kind=FailureKind.CANCELLED, message=f"cancelled by {by}")
        )

    async def end(self, request_id: str, failure: Failure) -> Request:
        """End a request without its worker: cancelled, expired, removed, damaged. Its executor is killed."""
        now = self._clock.wall()
        future = self._writer.submit(lambda store: store.end(request_id, now, failure=failure))
        when_settled(future, lambda request: self._ended(request, failure), ignored)
        try:
            return await asyncio.shield(future)
        except TransitionRefused:
            return (await self.view(request_id, ""))[0]

    def _ended(self, request: Request, failure: Failure) -> None:
        entry = self._board.open.get(request.id)
        if entry is not None and entry.request.holder is not None and self._outbox is not None:
            held = entry.request
            cancel = m.Cancel(request=held.id, attempt=held.attempt, reason=str(failure.kind))
            self._outbox.tell(entry.request.holder, cancel)
        self._leasing.forget(request.id)
        self._board.close(request)

    def session_closed(self, session: Session) -> None:
        """A client's socket is gone: the grace of its queued requests begins."""
        now = self._clock.monotonic()
        for request_id in session.requests:
            entry = self._board.open.get(request_id)
            if entry is not None and entry.session is session:
                entry.session, entry.orphaned_at = None, now

    async def list_requests(
        self, *, owner: str | None, states: Iterable[RequestState] = (), limit: int = 100
    ) -> list[Request]:
        """The newest first."""
        wanted = tuple(states)
        return await asyncio.to_thread(
            lambda: self._store.requests(owner=owner, states=wanted, limit=limit)
        )

    async def explain(self, request_id: str) -> dict[str, Any]:
        """Why a request is where it is, and what each attempt did."""
        request, update = await self.view(request_id, "")
        attempts = await asyncio.to_thread(self._store.attempts, request_id)
        waits = request.state is RequestState.QUEUED
        ahead = self._board.ahead(request) if waits else None
        return self._telling.explain(request, update, attempts, ahead, self._fleet.node)

    async def result_bytes(self, request_id: str) -> bytes | str:
        """A result's bytes, or its key in the object store; `NotFound` with the reason if there is none."""
        request = await asyncio.to_thread(self._store.get, request_id)
        if request is None or request.result is None:
            raise NotFound(f"request {request_id} has no result")
        if request.result.deleted_at is not None:
            raise NotFound(self._telling.deleted(request))
        if request.result.key is not None:
            return request.result.key
        data = await asyncio.to_thread(self._store.inline_result, request_id)
        if data is None or len(data) != request.result.size_bytes:
            raise NotFound(
                f"the stored result of request {request_id} is damaged; run it again and tell the operator"
            )
        return data

    # -- the timer -----------------------------------------------------------------------------------------------------

    def overdue(self, grace_s: float) -> list[tuple[str, Failure]]:
        """Requests whose end date in the queue, or whose client's grace before they began, has passed; with their errors."""
        wall, now = self._clock.wall(), self._clock.monotonic()
        out = []
        for entry in self._board.open.values():
            request = entry.request
            if entry.busy or not self._leasing.waits(entry):
                continue
            if request.state is RequestState.QUEUED and request.expires_at <= wall:
                out.append(
                    (
                        request.id,
                        self._telling.expired(request, self._fleet.provision(request.deployment)),
                    )
                )
            elif (
                entry.orphaned_at is not None
                and not request.keep
                and now - entry.orphaned_at > grace_s
            ):
                message = f"cancelled: its client's connection closed more than {grace_s:.0f} s ago, before it had started"
                out.append((request.id, Failure(kind=FailureKind.CANCELLED, message=message)))
        return out

    async def retain(self, retention_s: float) -> int:
        """Delete results older than the retention; returns how many."""
        before = self._clock.wall() - retention_s
        old = await asyncio.to_thread(
            lambda: self._store.ended_before(before, limit=_RETENTION_BATCH)
        )
        for request in old:
            # In this order a poll never finds a result that has no bytes; what the store does not
            # delete now is found by its sweep.
            await self._forget_result(request.id)
            if request.result is not None and request.result.key is not None:
                await self._objects.delete(request.id)
        return len(old)

    async def _forget_result(self, request_id: str) -> None:
        now = self._clock.wall()
        await self._writer.submit(lambda store: store.forget_result(request_id, now))

    def waiting(self, deployment: str) -> int:
        """How many requests of a deployment have not ended."""
        return sum(
            1 for each in self._board.open.values() if each.request.deployment == deployment
        )

    async def end_waiting(self, deployment: str, why: str) -> int:
        """End all open requests of a deployment."""
        ids = [
            key for key, each in self._board.open.items() if each.request.deployment == deployment
        ]
        for request_id in ids:
            await self.end(request_id, Failure(kind=FailureKind.REMOVED, message=why))
        return len(ids)
