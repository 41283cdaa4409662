"""What clients are told: the state, the one line that explains it (`lines`), and `meta`.

The status line says what happens now and what the request waits for; `request explain` says the same, and what each
attempt did. `meta` uses NDIF's key names (`runtime`,
`max_mem_by_gpu`, …) and adds what a researcher needs to repeat the run: commit, dtype, versions, isolation level,
attempt, seconds queued. A failure carries `meta.error`, so that scripts branch on a kind and not on a text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain.limits import COSTS
from edif_hpc.domain.request import (
    Failure,
    FailureKind,
    Provision,
    Request,
    RequestState,
)
from edif_hpc.errors import NotFound
from edif_hpc.objects.base import ObjectStore
from edif_hpc.relay import lines
from edif_hpc.relay.lines import Ahead
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

    def open(self, request: Request, state: RequestState, line: str) -> Update:
        """A request that has not ended, as it stands now."""
        return Update(
            request_id=request.id, status=state, description=line, meta=self._meta(request)
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
            f"ran {ran:.2f} s, {lines.size(result.size_bytes)}"
            if isinstance(ran, int | float)
            else lines.size(result.size_bytes)
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
        warm = provision[0] is Provision.WARM
        what = "others were before it in the queue" if warm else provision[1]
        message = f"not run within {lines.duration(waited)}. At the end: {what}. Send it again, or ask the operator for a longer queue time."
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
        self,
        request: Request,
        update: Update,
        attempts: Iterable[Attempt],
        ahead: Ahead | None,
        node_of: Callable[[str], str],
    ) -> dict[str, Any]:
        """The facts behind the status line, as JSON; `ahead` if it waits in the queue."""
        return {
            "id": request.id,
            "state": str(update.status),
            "why": update.description,
            "deployment": request.deployment,
            "owner": request.owner,
            "position": ahead.place if ahead is not None else 0,
            "ahead": {"requests": ahead.requests, "people": ahead.people} if ahead else None,
            "start_in_s": ahead.start_s if ahead is not None else None,
            "accepted_at": request.accepted_at,
            "expires_at": request.expires_at,
            "ended_at": request.ended_at,
            "attempt": request.attempt,
            "crashes": request.crashes,
            "meta": update.meta,
            "attempts": [_attempt(each, node_of(each.holder)) for each in attempts],
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

    def _error(self, request: Request, failure: Failure, meta: dict[str, Any]) -> Update:
        cost, details = _cost_of_a_lost_attempt(failure.details)
        error = {**details, "kind": str(failure.kind)}
        return Update(
            request_id=request.id,
            status=RequestState.ERROR,
            description=failure.message,
            meta=cost | meta | {"error": error},
        )

    def _meta(self, request: Request) -> dict[str, Any]:
        meta = dict(request.meta)
        meta["attempt"] = request.attempt
        meta["limits"] = request.limits.numbers()
        if request.ended_at is not None and request.attempt == 0:
            meta["queued_s"] = round(max(0.0, request.ended_at - request.accepted_at), 3)
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
        for key in ("commit", "dtype", "versions", "isolation", "device", "weights", "unverified")
        if key in facts
    }


def _cost_of_a_lost_attempt(
    details: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take out of the evidence what the last attempt had used, which has no other way to `meta` when its executor died."""
    cost = {name: _number(details[name]) for name in COSTS if name in details}
    return cost, {name: fact for name, fact in details.items() if name not in cost}


def _number(text: Any) -> float | int | None:
    try:
        return int(text) if str(text).isdecimal() else float(text)
    except (TypeError, ValueError):
        return None


def _attempt(attempt: Attempt, node: str) -> dict[str, Any]:
    cause = attempt.evidence.get("cause", "")
    return {
        "attempt": attempt.attempt,
        "holder": attempt.holder[:8],
        "node": node,
        "granted_at": attempt.granted_at,
        "started_at": attempt.started_at,
        "ended_at": attempt.ended_at,
        "end": attempt.end,
        "how": lines.ended(attempt.end, node=node, cause=cause),
    }
