"""What clients are told: the state, the one line that explains it, and `meta`.

The status line says what happens now and what the request waits for. `meta` uses NDIF's key names (`runtime`,
`max_mem_by_gpu`, …) and adds what a researcher needs to repeat the run: commit, dtype, versions, isolation level,
attempt, seconds queued. A failure carries `meta.error`, so that scripts branch on a kind and not on a text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.request import (
    Failure,
    FailureKind,
    Provision,
    Request,
    RequestState,
    shown_state,
)
from edif_hpc.errors import NotFound
from edif_hpc.objects.base import ObjectStore
from edif_hpc.relay.seats import Worker
from edif_hpc.relay.sessions import Update
from edif_hpc.store.base import Attempt

_log = logging.getLogger(__name__)


class Telling:
    """Composes updates. `result_link` makes the signed relay URL of a result, given a request id and a base URL."""

    def __init__(
        self,
        *,
        clock: Clock,
        objects: ObjectStore,
        result_link: Callable[[str, str], str],
        heartbeat_s: float,
    ) -> None:
        self._clock = clock
        self._objects = objects
        self._result_link = result_link
        self.heartbeat_s = heartbeat_s

    # -- updates -------------------------------------------------------------------------------------------------------

    def waiting(
        self,
        request: Request,
        position: int,
        provision: tuple[Provision, str],
        *,
        why: LeaseEnd | None = None,
    ) -> Update:
        """A request that has not ended, as it stands now."""
        state = shown_state(request.state, provision[0])
        return Update(
            request_id=request.id,
            status=state,
            description=self._line(request, position, provision, why),
            meta=self._meta(request),
        )

    def dispatched(self, request: Request, worker: Worker) -> Update:
        """A worker has the lease."""
        return Update(
            request_id=request.id,
            status=RequestState.DISPATCHED,
            description=f"sent to {_place(worker)}",
            meta=self._meta(request),
        )

    def running(self, request: Request, worker: Worker) -> Update:
        """An executor runs it."""
        meta = self._meta(request) | {"attempt": request.attempt}
        return Update(
            request_id=request.id,
            status=RequestState.RUNNING,
            description=f"running on {_place(worker)}",
            meta=meta,
        )

    async def ended(
        self, request: Request, base_url: str, *, inline: bytes | None = None
    ) -> Update:
        """The end: the result's bytes or URL, or the error."""
        meta = self._meta(request)
        if request.failure is not None:
            return self._error(request, request.failure, meta)
        result = request.result
        if result is None:
            return self._error(
                request,
                Failure(
                    kind=FailureKind.DAMAGED,
                    message="the result's record is damaged; run it again",
                ),
                meta,
            )
        if result.deleted_at is not None:
            return self._error(
                request, Failure(kind=FailureKind.EXPIRED, message=self.deleted(request)), meta
            )
        data: bytes | str | None = inline
        if inline is None:
            data = await self._url(request, result.key, base_url)
        if data is None:
            lost = f"the bytes of the result of request {request.id} are missing from the store; run it again and tell the operator"
            return self._error(request, Failure(kind=FailureKind.DAMAGED, message=lost), meta)
        ran = request.meta.get("runtime")
        line = (
            f"ran {ran:.2f} s, {_size(result.size_bytes)}"
            if isinstance(ran, int | float)
            else _size(result.size_bytes)
        )
        return Update(
            request_id=request.id,
            status=RequestState.COMPLETED,
            description=line,
            meta=meta,
            data=data,
        )

    # -- texts ---------------------------------------------------------------------------------------------------------

    def expired(self, request: Request, provision: tuple[Provision, str]) -> Failure:
        """The error of a request whose end date passed in the queue."""
        waited = self._clock.wall() - request.accepted_at
        what = "other requests, in the queue" if provision[0] is Provision.WARM else provision[1]
        message = f"not run within {_duration(waited)}: it waited for {what}. Send it again, or ask the operator for a longer queue time."
        return Failure(kind=FailureKind.EXPIRED, message=message)

    def deleted(self, request: Request) -> str:
        """What a poll says of a result that retention removed."""
        at = request.result.deleted_at if request.result is not None else None
        when = (
            datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
            if at is not None
            else "earlier"
        )
        return f"the result of request {request.id} was deleted on {when}, at the end of its retention; run it again"

    def explain(
        self, request: Request, update: Update, attempts: Iterable[Attempt], position: int
    ) -> dict[str, Any]:
        """The facts behind the status line, as JSON."""
        return {
            "id": request.id,
            "state": str(update.status),
            "why": update.description,
            "deployment": request.deployment,
            "owner": request.owner,
            "position": position,
            "accepted_at": request.accepted_at,
            "expires_at": request.expires_at,
            "ended_at": request.ended_at,
            "attempt": request.attempt,
            "crashes": request.crashes,
            "meta": update.meta,
            "attempts": [
                {
                    "attempt": each.attempt,
                    "holder": each.holder[:8],
                    "granted_at": each.granted_at,
                    "started_at": each.started_at,
                    "ended_at": each.ended_at,
                    "end": each.end,
                }
                for each in attempts
            ],
        }

    def canonical(self, request: Request) -> None:
        """The one log line of a request that ended."""
        _log.info(
            "request ended",
            extra={
                "event": "request_ended",
                "request": request.id,
                "owner": request.owner,
                "deployment": request.deployment,
                "state": str(request.state),
                "kind": str(request.failure.kind) if request.failure else None,
                "attempt": request.attempt,
                "crashes": request.crashes,
                "seconds": round(
                    (request.ended_at or request.accepted_at) - request.accepted_at, 3
                ),
                "runtime_s": request.meta.get("runtime"),
                "result_bytes": request.result.size_bytes if request.result else None,
            },
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    def _line(
        self,
        request: Request,
        position: int,
        provision: tuple[Provision, str],
        why: LeaseEnd | None,
    ) -> str:
        if request.state is RequestState.DISPATCHED:
            return "sent to a worker"
        if request.state is RequestState.RUNNING:
            return "running"
        again = (
            f"; attempt {request.attempt} ended ({why}), it runs again" if why is not None else ""
        )
        if provision[0] is not Provision.WARM:
            return f"waits for the model: {provision[1]}{again}"
        ahead = "next" if position <= 1 else f"{position - 1} ahead"
        return f"in the queue of {request.deployment}, {ahead}{again}"

    def _error(self, request: Request, failure: Failure, meta: dict[str, Any]) -> Update:
        error = {"kind": str(failure.kind), **failure.details}
        return Update(
            request_id=request.id,
            status=RequestState.ERROR,
            description=failure.message,
            meta=meta | {"error": error},
        )

    def _meta(self, request: Request) -> dict[str, Any]:
        meta = dict(request.meta)
        meta["attempt"] = request.attempt
        return meta

    async def _url(self, request: Request, key: str | None, base_url: str) -> str | None:
        if key is None:
            return self._result_link(request.id, base_url)
        try:
            return await self._objects.read_url(key, base_url=base_url)
        except NotFound:
            return None


def facts_for_meta(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What of a worker's environment belongs into `meta`."""
    return {
        key: facts[key]
        for key in ("commit", "dtype", "versions", "isolation", "device")
        if key in facts
    }


def _place(worker: Worker) -> str:
    return f"{worker.peer.deployment}/{worker.peer.slot}"


def _size(size_bytes: int) -> str:
    amount = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {secs} s"
