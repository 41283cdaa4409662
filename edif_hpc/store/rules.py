"""What each state change of a request writes, as pure functions.

A store loads what it has about a request (`Stored`), asks the function of the change what follows,
and writes the `Change` that it gets. So the rules exist once, and an implementation of the store
cannot differ in them.

The fence is `holding`: a worker's write counts only while the newest attempt is the writer's own
and has not ended. `repeats` recognises the one exception, a report that was stored before and
whose acknowledgement was lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from edif_hpc.domain.lease import LeaseEnd, spends_budget, verdict
from edif_hpc.domain.request import (
    LEASED,
    Failure,
    NewRequest,
    Request,
    RequestState,
    ResultRef,
    check_transition,
)
from edif_hpc.errors import InvalidInput, StaleAttempt, TransitionRefused
from edif_hpc.store.base import Attempt, Charge

COMPLETED_END: Final = "completed"
ERROR_END: Final = "error"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What the store has about a request: its row, and the newest of its attempts."""

    request: Request
    newest: Attempt | None


@dataclass(frozen=True, kw_only=True)
class Change:
    """The rows that a state change writes. The charge is there exactly when the request ends."""

    request: Request
    attempt: Attempt | None = None
    charge: Charge | None = None


def accepted(new: NewRequest, seq: int) -> Request:
    """The request as it enters the queue."""
    check_transition(new.id, RequestState.RECEIVED, RequestState.QUEUED)
    sent = {each.name: getattr(new, each.name) for each in fields(new)}
    return Request(**sent, seq=seq, state=RequestState.QUEUED, attempt=0, crashes=0)


def leased(stored: Stored, holder: str, now: float) -> tuple[Request, Attempt]:
    """QUEUED → DISPATCHED under a new attempt."""
    old = stored.request
    check_transition(old.id, old.state, RequestState.DISPATCHED)
    number = old.attempt + 1
    return (
        replace(old, state=RequestState.DISPATCHED, attempt=number, holder=holder),
        Attempt(request_id=old.id, attempt=number, holder=holder, granted_at=now),
    )


def repeats(stored: Stored, attempt: int, holder: str, end: str) -> bool:
    """Whether this very attempt has already ended the request in this way."""
    last = stored.newest
    return last is not None and (last.attempt, last.holder, last.end) == (attempt, holder, end)


def holding(stored: Stored, attempt: int, holder: str) -> Attempt:
    """The attempt of a write, if it holds the lease; else raise `StaleAttempt`."""
    last = stored.newest
    if (
        last is None
        or (last.attempt, last.holder) != (attempt, holder)
        or last.ended_at is not None
    ):
        raise StaleAttempt(
            f"attempt {attempt} by {holder} does not hold the lease of request "
            f"{stored.request.id}, which is {stored.request.state} at attempt "
            f"{stored.request.attempt}; drop this work"
        )
    return last


def started(stored: Stored, attempt: int, holder: str, now: float) -> Change | None:
    """DISPATCHED → RUNNING; None if this attempt has started before."""
    lease = holding(stored, attempt, holder)
    old = stored.request
    if old.state is RequestState.RUNNING:
        return None
    check_transition(old.id, old.state, RequestState.RUNNING)
    return Change(
        request=replace(old, state=RequestState.RUNNING),
        attempt=replace(lease, started_at=now),
    )


def released(
    stored: Stored,
    lease: Attempt,
    now: float,
    *,
    end: LeaseEnd,
    evidence: Mapping[str, str],
    workers_lost: int,
) -> Change:
    """A lease that ended without an answer: back to the queue, or to ERROR.

    Args:
        stored: the request and its attempt.
        lease: the attempt that ends, from `holding`.
        now: wall clock.
        end: how it ended.
        evidence: facts about the end.
        workers_lost: earlier attempts of this request that took their worker with them.
    """
    old = stored.request
    if end is LeaseEnd.STOLEN and old.state is RequestState.RUNNING:
        raise TransitionRefused(f"request {old.id} has started; its lease cannot be stolen")
    closed = replace(lease, ended_at=now, end=str(end), evidence=dict(evidence))
    old = replace(old, crashes=old.crashes + spends_budget(end))
    failure = verdict(
        crashes=old.crashes,
        end=end,
        workers_killed=workers_lost + took_worker(closed),
        evidence=evidence,
    )
    if failure is not None:
        return _to_error(old, closed, now, failure)
    check_transition(old.id, old.state, RequestState.QUEUED)
    return Change(request=replace(old, state=RequestState.QUEUED, holder=None), attempt=closed)


def took_worker(attempt: Attempt) -> bool:
    """Whether the worker died with this attempt."""
    return attempt.end == LeaseEnd.WORKER_LOST


def completed(
    stored: Stored,
    lease: Attempt,
    now: float,
    *,
    result: ResultRef,
    inline: bytes | None,
    meta: Mapping[str, Any],
) -> Change:
    """To COMPLETED by the attempt that holds the lease."""
    old = stored.request
    check_transition(old.id, old.state, RequestState.COMPLETED)
    if (inline is None) is (result.key is None):
        raise InvalidInput(
            f"the result of request {old.id} needs bytes or a key, one of them; it has the key "
            f"{result.key!r} and {'no' if inline is None else len(inline)} bytes"
        )
    new = replace(
        old,
        state=RequestState.COMPLETED,
        holder=None,
        ended_at=now,
        result=result,
        meta=dict(meta),
    )
    closed = replace(lease, ended_at=now, end=COMPLETED_END)
    return Change(request=new, attempt=closed, charge=_charge(old, closed, now))


def failed(
    stored: Stored, lease: Attempt, now: float, *, failure: Failure, meta: Mapping[str, Any]
) -> Change:
    """To ERROR by the attempt that holds the lease."""
    closed = replace(lease, ended_at=now, end=ERROR_END)
    return _to_error(replace(stored.request, meta=dict(meta)), closed, now, failure)


def ended(stored: Stored, now: float, *, failure: Failure) -> Change:
    """To ERROR without a worker; an open lease ends with it."""
    lease = stored.newest if stored.request.state in LEASED else None
    closed = None if lease is None else replace(lease, ended_at=now, end=str(failure.kind))
    return _to_error(stored.request, closed, now, failure)


def result_forgotten(request: Request, now: float) -> Request:
    """A completed request whose result is deleted; the first deletion counts."""
    if request.result is None:
        raise TransitionRefused(f"request {request.id} is {request.state}; it has no result")
    if request.result.deleted_at is not None:
        return request
    return replace(request, result=replace(request.result, deleted_at=now))


def _to_error(old: Request, attempt: Attempt | None, now: float, failure: Failure) -> Change:
    check_transition(old.id, old.state, RequestState.ERROR)
    new = replace(old, state=RequestState.ERROR, holder=None, ended_at=now, failure=failure)
    return Change(request=new, attempt=attempt, charge=_charge(old, attempt, now))


def _charge(old: Request, attempt: Attempt | None, now: float) -> Charge:
    began = now
    if attempt is not None and attempt.started_at is not None:
        began = attempt.started_at
    elif attempt is not None and attempt.end in {COMPLETED_END, ERROR_END}:
        began = attempt.granted_at  # it ran, only its START never came
    # Wall clocks may jump back; a charge is never negative.
    return Charge(
        request_id=old.id,
        owner=old.owner,
        deployment=old.deployment,
        run_s=max(0.0, now - began),
        queued_s=max(0.0, began - old.accepted_at),
        at=now,
    )
