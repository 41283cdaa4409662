"""An allocation: one scheduler job that fills a slot of a deployment for one generation.

A slot is one wanted replica, `<deployment>/<index>`; its generations are numbered from 1. What an allocation did is
kept as events, so that accounting adds up later. `TRANSITIONS` is the machine; ENDED is its one end, with a cause.

    ORDERED ──► SUBMITTED ──► STARTED ──► LOADING ──► WARM ──► DRAINING ──► ENDED
       └────────────┴────────────┴───────────┴─────────┴──────────────────► ENDED

ORDERED is the intent, written before anybody submits: whoever is to submit it (a launcher, or the pilot of the generation
before) takes it under a lease, `order_holder` until `order_until`. A job that starts before its submission was reported goes
from ORDERED straight to STARTED.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edif_hpc.errors import TransitionRefused


class AllocationState(StrEnum):
    """Where an allocation is in its life."""

    ORDERED = "ordered"  #: wanted; nobody is known to have submitted it
    SUBMITTED = "submitted"  #: handed to the scheduler
    STARTED = "started"  #: its pilot has said hello
    LOADING = "loading"  #: its worker loads the model
    WARM = "warm"  #: model loaded and self-test passed
    DRAINING = "draining"  #: takes no more leases
    ENDED = "ended"


_A = AllocationState

TRANSITIONS: Mapping[AllocationState, frozenset[AllocationState]] = {
    _A.ORDERED: frozenset({_A.SUBMITTED, _A.STARTED, _A.ENDED}),
    _A.SUBMITTED: frozenset({_A.STARTED, _A.ENDED}),
    _A.STARTED: frozenset({_A.LOADING, _A.DRAINING, _A.ENDED}),
    # A worker that died is started again in the same allocation, so WARM may go back to LOADING.
    _A.LOADING: frozenset({_A.WARM, _A.DRAINING, _A.ENDED}),
    _A.WARM: frozenset({_A.LOADING, _A.DRAINING, _A.ENDED}),
    _A.DRAINING: frozenset({_A.ENDED}),
    _A.ENDED: frozenset(),
}

PENDING = frozenset({_A.ORDERED, _A.SUBMITTED})  #: its job has not begun, as far as is known
RUNNING = frozenset(
    {_A.STARTED, _A.LOADING, _A.WARM}
)  #: its job runs, and nobody told it to leave


def check_transition(allocation: str, old: AllocationState, new: AllocationState) -> None:
    """Raise `TransitionRefused` unless the table lists `old → new`."""
    if new not in TRANSITIONS[old]:
        raise TransitionRefused(f"allocation {allocation} is {old}; it cannot become {new}")


def steps_to(old: AllocationState, new: AllocationState) -> tuple[AllocationState, ...]:
    """The listed steps from one state to another, LOADING made up for if it was missed; none if there is no way."""
    if new in TRANSITIONS[old]:
        return (new,)
    missed = AllocationState.LOADING
    if missed in TRANSITIONS[old] and new in TRANSITIONS[missed]:
        return (missed, new)
    return ()


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """One job of a scheduler that fills `slot` for `generation`."""

    id: str
    deployment: str
    slot: int
    generation: int
    site: str
    state: AllocationState
    submitted_at: float  #: when it was ordered; its events tell when the scheduler took it
    walltime_min: int | None = None  #: what its job asks for; None has no end
    begin_after_s: float = 0.0  #: its job shall not begin sooner after the order
    order_holder: str | None = (
        None  #: who has taken the order: a launcher, or a pilot's allocation
    )
    order_until: float | None = None  #: end of that one's lease of the order, wall clock
    job_id: str | None = None  #: the scheduler's id, once known
    node: str | None = None
    started_at: float | None = None  #: when its pilot joined
    warm_at: float | None = None
    ended_at: float | None = None
    cause: str | None = None  #: why it ended
    detail: str = ""  #: what it does now, or its last words

    @property
    def place(self) -> tuple[str, int]:
        """The slot that it fills."""
        return self.deployment, self.slot

    @property
    def name(self) -> str:
        """The job name that marks it as ours."""
        return f"edif-{self.deployment}-{self.slot}-{self.generation}-{self.id[:8]}"


@dataclass(frozen=True, kw_only=True)
class AllocationEvent:
    """One fact in the life of an allocation; `at` is wall clock."""

    allocation: str
    at: float
    event: str
    detail: Mapping[str, Any] = field(default_factory=dict)


class PeerRole(StrEnum):
    """What a peer on the ZeroMQ link is."""

    WORKER = "worker"
    PILOT = "pilot"
    LAUNCHER = "launcher"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A CURVE key that the relay knows, and whose it is. `key` is the public key in Z85."""

    key: str
    role: PeerRole
    allocation: str
    deployment: str
    slot: int
    generation: int
    created_at: float
    revoked_at: float | None = None
