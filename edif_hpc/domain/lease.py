"""A lease: a worker's right to run a request until it expires, and what follows when it ends without an answer.

A lease is the pair `(request, attempt)` held by one peer. Attempts only grow, and every write by a worker carries
its attempt, so that a worker that was thought dead cannot write over its successor (fencing).

Expiry lives in the relay's monotonic time and is never stored: a stored time means nothing after a reboot, and a
relay that was stopped would expire leases whose renewals lie unread in its socket. `LeaseClock` keeps the deadlines
and moves them all when the loop itself was late.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from edif_hpc.domain.request import Failure, FailureKind

LEASE_S = 30.0
HEARTBEAT_S = 5.0
CRASH_BUDGET = 3
QUARANTINE_WORKERS = 2
LATE_LOOP_S = 1.0


class LeaseEnd(StrEnum):
    """Why a lease ended without an answer."""

    STOLEN = "stolen"  #: taken back before it started, for an idle worker
    DRAINED = "drained"  #: the worker is leaving
    RELEASED = "released"  #: the worker gave it back unstarted
    PREEMPTED = "preempted"  #: the scheduler took the allocation
    WALLTIME = "walltime"  #: the allocation ended
    EXPIRED = "expired"  #: no renewal came: network or node lost
    EXECUTOR_CRASH = "executor_crash"  #: the executor died, the worker lives
    OOM = "oom"  #: killed for memory
    WORKER_LOST = "worker_lost"  #: the worker's process died
    UNKNOWN = "unknown"


_SPENDS = frozenset(
    {LeaseEnd.EXECUTOR_CRASH, LeaseEnd.OOM, LeaseEnd.WORKER_LOST, LeaseEnd.UNKNOWN}
)


def spends_budget(end: LeaseEnd) -> bool:
    """Whether this end counts against the request: only crashes, OOM and unknown causes do."""
    return end in _SPENDS


def verdict(
    *, crashes: int, end: LeaseEnd, workers_killed: int, evidence: Mapping[str, str]
) -> Failure | None:
    """What follows for the request: None puts it back at the head of its user's line, a `Failure` ends it.

    Args:
        crashes: attempts that spent the budget, this one included.
        end: how the lease ended.
        workers_killed: workers that died while they ran this request, this one included.
        evidence: facts about the end, for the owner and the operator.
    """
    # The evidence names its own cause in words; the kind of end has its own key.
    details = {"attempts_lost": crashes, "ended_by": str(end), **evidence}
    last = evidence.get("cause") or str(end)
    if workers_killed >= QUARANTINE_WORKERS:
        return Failure(
            kind=FailureKind.CRASH,
            message=f"quarantined: {workers_killed} workers died while they ran this request "
            f"(the last: {last}). It is not tried again; run it smaller, or ask the operator with "
            "this request's id.",
            details=details,
        )
    if crashes >= CRASH_BUDGET:
        return Failure(
            kind=FailureKind.OOM if end is LeaseEnd.OOM else FailureKind.CRASH,
            message=f"the process that ran this request died {crashes} times, and it is not tried "
            f"again. The last time: {last}.",
            details=details,
        )
    return None


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right of `holder` to run `request_id`, fenced by `attempt`."""

    request_id: str
    attempt: int
    holder: str


class LeaseClock:
    """Deadlines of open leases in monotonic seconds. Pure: `now` is an argument."""

    def __init__(self, *, lease_s: float = LEASE_S) -> None:
        self._lease_s = lease_s
        self._deadlines: dict[str, float] = {}
        self._last_tick: float | None = None

    def open(self, request_id: str, now: float, *, grace: float = 1.0) -> None:
        """Start or renew; after a start of the relay each open lease gets `grace` = 2 lease lengths."""
        self._deadlines[request_id] = now + self._lease_s * grace

    def close(self, request_id: str) -> None:
        """Forget a lease that ended."""
        self._deadlines.pop(request_id, None)

    def left_s(self, request_id: str, now: float) -> float | None:
        """How long a lease still stands; None if there is none."""
        deadline = self._deadlines.get(request_id)
        return None if deadline is None else max(0.0, deadline - now)

    def sweep(self, now: float, *, period_s: float) -> list[str]:
        """Ids whose lease expired. The caller drains its socket first.

        When the previous sweep lies more than `period_s` + 1 s back, the loop was late (stopped, swapped out) and
        every deadline moves by the lateness: a peer is not blamed for our own silence.
        """
        late = 0.0 if self._last_tick is None else now - self._last_tick - period_s
        self._last_tick = now
        if late > LATE_LOOP_S:
            self._deadlines = {key: at + late for key, at in self._deadlines.items()}
        return [key for key, at in self._deadlines.items() if at <= now]

    def __len__(self) -> int:
        return len(self._deadlines)
