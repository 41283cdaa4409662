"""A request: one nnsight job of a researcher, from its acceptance to its one end.

The states are nnsight's own closed list of names, because any other string kills the client. A request is stored
as QUEUED, DISPATCHED, RUNNING, COMPLETED or ERROR; PROVISIONING and DEPLOYING are how a queued request is *shown*
while its deployment has no allocation, or one whose worker is still loading (`shown_state`).

    RECEIVED ──► QUEUED ──► DISPATCHED ──► RUNNING ──► COMPLETED
                  ▲  │          │             │
                  │  │          │             ├──► ERROR      (user error, limit, crash budget spent)
                  │  └──────────┼─────────────┼──► ERROR      (cancelled, expired, deployment removed)
                  └─────────────┴─────────────┘               (the lease was lost, returned or stolen)

`TRANSITIONS` is the machine; a pair that it does not list raises and changes nothing. What ended a request without
a result is a `Failure`, whose `kind` travels as `meta.error.kind`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edif_hpc.domain.limits import Limits as Limits  # part of a request
from edif_hpc.errors import OverLimit, TransitionRefused


class RequestState(StrEnum):
    """Where a request is; the names are those of nnsight's `Status`."""

    RECEIVED = "RECEIVED"  #: bytes and row are being written; no one has been told yet
    QUEUED = "QUEUED"  #: waits for a worker
    PROVISIONING = "PROVISIONING"  #: shown only: no allocation serves the deployment yet
    DEPLOYING = "DEPLOYING"  #: shown only: a worker is loading the model
    DISPATCHED = "DISPATCHED"  #: a worker holds the lease and has not started
    RUNNING = "RUNNING"  #: an executor runs it
    COMPLETED = "COMPLETED"  #: the result is durable
    ERROR = "ERROR"  #: ended without a result; the failure says why


_S = RequestState

TRANSITIONS: Mapping[RequestState, frozenset[RequestState]] = {
    _S.RECEIVED: frozenset({_S.QUEUED}),
    _S.QUEUED: frozenset({_S.DISPATCHED, _S.ERROR}),
    _S.PROVISIONING: frozenset(),
    _S.DEPLOYING: frozenset(),
    _S.DISPATCHED: frozenset({_S.RUNNING, _S.QUEUED, _S.COMPLETED, _S.ERROR}),
    _S.RUNNING: frozenset({_S.QUEUED, _S.COMPLETED, _S.ERROR}),
    _S.COMPLETED: frozenset(),
    _S.ERROR: frozenset(),
}

TERMINAL = frozenset({_S.COMPLETED, _S.ERROR})
LEASED = frozenset({_S.DISPATCHED, _S.RUNNING})
STORED = frozenset({_S.QUEUED, *LEASED, *TERMINAL})


def check_transition(request_id: str, old: RequestState, new: RequestState) -> None:
    """Raise `TransitionRefused` unless the table lists `old → new`."""
    if new not in TRANSITIONS[old]:
        raise TransitionRefused(f"request {request_id} is {old}; it cannot become {new}")


class FailureKind(StrEnum):
    """What ended a request without a result (`meta.error.kind`)."""

    USER = "user"  #: the researcher's code raised
    OOM = "oom"  #: out of memory, on the device or the host
    TIMEOUT = "timeout"  #: it ran longer than its limit
    LIMIT = (
        "limit"  #: another limit: of the result, of what it prints, of the tensors that it saves
    )
    CRASH = "crash"  #: the executor or worker died, more often than the budget allows
    CANCELLED = "cancelled"  #: by its owner, an operator, or a closed connection
    EXPIRED = "expired"  #: it waited in the queue until its end date
    REMOVED = "removed"  #: its deployment was removed
    ENGINE = "engine"  #: ours: the worker could not run it
    DAMAGED = "damaged"  #: its stored bytes cannot be read back as they were accepted


_KIND_OF_LIMIT = {
    "wall_s": FailureKind.TIMEOUT,
    "memory_bytes": FailureKind.OOM,
    "gpu_memory_bytes": FailureKind.OOM,
}


def kind_of(over: OverLimit) -> FailureKind:
    """How a request ends that went over a limit."""
    return _KIND_OF_LIMIT.get(str(over.details["limit"]), FailureKind.LIMIT)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An honest error: its kind, the text that the researcher sees, and further facts for `meta.error`."""

    kind: FailureKind
    message: str
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NewRequest:
    """What a client sent, checked, before it has been accepted."""

    id: str
    owner: str  #: id of the token that sent it
    deployment: str
    model_key: str  #: as the client sent it: the task in it decides the pipeline
    compress: bool  #: the blob is zstd, and so must the result be
    env: Mapping[str, Any]
    blob_bytes: int
    blob_sha256: str
    limits: Limits
    accepted_at: float  #: wall clock of the relay, seconds since the epoch
    expires_at: float  #: end date while queued, wall clock
    keep: bool = False  #: stays queued when the client's socket closes
    client: Mapping[str, str] = field(default_factory=dict)  #: versions that the client told


@dataclass(frozen=True, kw_only=True)
class Request:
    """An accepted request as it is stored. `seq` is its place in the order of acceptance, kept when it is requeued."""

    id: str
    seq: int
    owner: str
    deployment: str
    model_key: str
    compress: bool
    env: Mapping[str, Any]
    blob_bytes: int
    blob_sha256: str
    limits: Limits
    accepted_at: float
    expires_at: float
    keep: bool
    client: Mapping[str, str]
    state: RequestState
    attempt: int  #: number of the newest lease; 0 before the first
    crashes: int  #: attempts that ended by crash, OOM or an unknown cause
    holder: str | None = None  #: id of the peer that holds the lease
    ended_at: float | None = None
    failure: Failure | None = None
    result: ResultRef | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terminal(self) -> bool:
        """Whether it has ended."""
        return self.state in TERMINAL


@dataclass(frozen=True, kw_only=True)
class ResultRef:
    """Where a durable result lies: in the row (`key` is None) or in the object store."""

    size_bytes: int
    key: str | None
    deleted_at: float | None = None  #: when retention removed the bytes, wall clock


class Provision(StrEnum):
    """What a deployment has at the moment, as seen by a request that waits for it."""

    NONE = "none"  #: no allocation
    PENDING = "pending"  #: an allocation was submitted, no worker has said hello
    LOADING = "loading"  #: a worker loads the model
    WARM = "warm"  #: at least one worker serves


def shown_state(state: RequestState, provision: Provision) -> RequestState:
    """The state to show a client: a queued request of a deployment that is not warm says what it waits for."""
    if state is not RequestState.QUEUED:
        return state
    match provision:
        case Provision.NONE | Provision.PENDING:
            return RequestState.PROVISIONING
        case Provision.LOADING:
            return RequestState.DEPLOYING
        case Provision.WARM:
            return RequestState.QUEUED
