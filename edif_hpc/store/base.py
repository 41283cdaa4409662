"""The persistent queue, as a port: one atomic method per state change.

The store makes transitions atomic and durable; it does not choose them. Every method either
happens whole or raises and changes nothing. Writes by a worker carry `(request_id, attempt,
holder)` and are refused with `StaleAttempt` when another attempt holds the lease, so a worker that
was thought dead cannot write over its successor. An unknown id is `NotFound`.

Changes are made by one thread at a time (`store.writer`), inside `transaction()`, each within its
own `savepoint()`: a refused operation does not undo its neighbours, and nothing is revealed before
the commit. Reads (`get`, `requests`, …) may be called by any thread; they see committed state, and
inside a transaction its own changes too.

Two implementations hold one contract suite: `sqlite.SqliteStore` and the shipped fake
`memory.MemoryStore`. What both do alike is written once, in `rules` and `shared`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from edif_hpc.domain.allocation import Allocation, AllocationEvent, AllocationState, Peer
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Token
from edif_hpc.domain.request import Failure, NewRequest, Request, RequestState, ResultRef


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One lease of a request, kept for `request explain` and accounting. Times are wall clock."""

    request_id: str
    attempt: int
    holder: str
    granted_at: float
    started_at: float | None = None
    ended_at: float | None = None
    #: "completed", "error", a `LeaseEnd`, or the `FailureKind` that ended it from outside
    end: str | None = None
    evidence: Mapping[str, str] = field(default_factory=dict)  #: facts told when it was lost


@dataclass(frozen=True, kw_only=True)
class Grant:
    """What `lease` gives: the request in its new state, and its blob if that lies in the row."""

    request: Request
    blob: bytes | None


@dataclass(frozen=True, kw_only=True)
class Charge:
    """What one request cost its owner, written once, in the commit that ends it.

    Only the last attempt counts as run: an owner does not pay for work that we lost.
    """

    request_id: str
    owner: str
    deployment: str
    run_s: float
    queued_s: float
    at: float


class Store(Protocol):
    """The persistent queue."""

    # -- life ------------------------------------------------------------------------------------
    def open(self) -> None:
        """Open or create it, and bring the schema up to date."""

    def close(self) -> None:
        """Close it; further calls are errors."""

    def transaction(self) -> AbstractContextManager[None]:
        """A group of operations, committed together (fsync) on exit.

        An exception undoes the whole group; `StoreUnavailable` if the commit fails.
        """

    def savepoint(self) -> AbstractContextManager[None]:
        """One operation within a transaction; an exception undoes it alone."""

    # -- requests: every method is one state change ----------------------------------------------
    def accept(self, new: NewRequest, blob: bytes | None) -> Request:
        """RECEIVED → QUEUED. `Conflict` if the id exists.

        `blob` is None when its bytes lie in the blob folder. A blob in the row is deleted when the
        request ends: it cannot run again.
        """

    def lease(self, request_id: str, holder: str, now: float) -> Grant:
        """QUEUED → DISPATCHED with the next attempt number, held by `holder`."""

    def start(self, request_id: str, attempt: int, holder: str, now: float) -> Request:
        """DISPATCHED → RUNNING; a repeated start of the same attempt changes nothing."""

    def release(
        self,
        request_id: str,
        attempt: int,
        holder: str,
        now: float,
        *,
        end: LeaseEnd,
        evidence: Mapping[str, str],
    ) -> Request:
        """End a lease without an answer: to QUEUED, or to ERROR if `domain.lease.verdict` says so.

        A started lease cannot be stolen (`TransitionRefused`). Whether the worker was lost with
        this request or with another one is for the caller to say, by `end`.
        """

    def complete(
        self,
        request_id: str,
        attempt: int,
        holder: str,
        now: float,
        *,
        result: ResultRef,
        inline: bytes | None,
        meta: Mapping[str, Any],
    ) -> Request:
        """To COMPLETED, with the result's bytes (`inline`) or key, its charge, the attempt's end.

        A repetition by the same attempt returns the request unchanged: the answer to it may have
        been lost.
        """

    def fail(
        self,
        request_id: str,
        attempt: int,
        holder: str,
        now: float,
        *,
        failure: Failure,
        meta: Mapping[str, Any],
    ) -> Request:
        """To ERROR by the worker that ran it, with its charge; a repetition changes nothing."""

    def end(self, request_id: str, now: float, *, failure: Failure) -> Request:
        """To ERROR without a worker: cancelled, expired, removed, damaged."""

    def forget_result(self, request_id: str, now: float) -> Request:
        """Retention: delete the inline bytes, mark the result deleted; the state stays COMPLETED.

        A repetition keeps the first time.
        """

    # -- reads of requests -----------------------------------------------------------------------
    def get(self, request_id: str) -> Request | None:
        """One request, or None."""

    def open_requests(self) -> list[Request]:
        """All that have not ended, by seq: what the relay restores at its start."""

    def requests(
        self,
        *,
        owner: str | None = None,
        states: Iterable[RequestState] = (),
        limit: int = 100,
        before_seq: int | None = None,
    ) -> list[Request]:
        """The newest first; no `states` means all."""

    def blob(self, request_id: str) -> bytes | None:
        """A request's blob if it lies in the row."""

    def inline_result(self, request_id: str) -> bytes | None:
        """A result's bytes if they lie in the row."""

    def attempts(self, request_id: str) -> list[Attempt]:
        """All leases of a request, the first first."""

    def charges(self, *, owner: str | None = None) -> list[Charge]:
        """What ended requests cost, the oldest first."""

    def ended_before(self, at: float, *, limit: int) -> list[Request]:
        """COMPLETED requests that ended before `at` and whose result lies there: retention's work.

        The oldest first.
        """

    def run_seconds(self, deployment: str, *, limit: int = 200) -> list[float]:
        """Run times of the newest requests of a deployment that ran, for estimates."""

    # -- people ----------------------------------------------------------------------------------
    def add_token(self, token: Token) -> None:
        """`Conflict` if the id exists."""

    def revoke_token(self, token_id: str, now: float) -> Token:
        """`NotFound` if there is none; a second revocation keeps the first time."""

    def limit_token(self, token_id: str, change: Callable[[Allowed], Allowed]) -> Token:
        """Change what a token's requests may use, from now on. `NotFound` for an unknown one."""

    def tokens(self) -> list[Token]:
        """All, the oldest first."""

    # -- deployments, allocations, peers ---------------------------------------------------------
    def add_deployment(self, deployment: Deployment) -> None:
        """`Conflict` if the name is taken."""

    def change_deployment(self, name: str, **facts: str | float | Allowed | None) -> Deployment:
        """Set what an operator may change: `replicas`, `site`, `gpu`, `gpus`, `walltime_min`, `up_at`, `limits`."""

    def remove_deployment(self, name: str) -> None:
        """`NotFound` if there is none."""

    def deployments(self) -> list[Deployment]:
        """All, by name."""

    def add_allocation(self, allocation: Allocation, join_sha256: str | None) -> None:
        """A new allocation and the hash of its one-time join token; an order has none yet.

        `Conflict` for an id, a token or a (deployment, slot, generation) in use.
        """

    def change_allocation(
        self,
        allocation_id: str,
        now: float,
        *,
        state: AllocationState | None = None,
        **facts: str | float | None,
    ) -> Allocation:
        """Move it along the table and set facts (`job_id`, `node`, `cause`, `detail`).

        An event with the facts is kept for each change of state; the first WARM and the end set
        their times.
        """

    def take_order(
        self, allocation_id: str, holder: str, now: float, *, lease_s: float, join_sha256: str
    ) -> Allocation:
        """Lease an order to who is to submit it; the join token before is worth nothing any more.

        `TransitionRefused` while another one holds it, or when it is no order any more.
        """

    def free_order(self, allocation_id: str, holder: str) -> Allocation:
        """Give an order back that was certainly not submitted; by its holder alone."""

    def submit_order(self, allocation_id: str, holder: str, job_id: str, now: float) -> Allocation:
        """ORDERED → SUBMITTED, by its holder alone; a repetition changes nothing."""

    def allocations(self, *, live_only: bool = True) -> list[Allocation]:
        """Oldest first."""

    def allocation_events(self, allocation_id: str) -> list[AllocationEvent]:
        """Oldest first."""

    def join(self, join_sha256: str, now: float) -> Allocation:
        """Spend a join token and give its allocation.

        `NotAuthenticated` if the token is unknown, was spent, or its allocation has ended.
        """

    def add_peers(self, peers: Sequence[Peer]) -> None:
        """Register keys of known allocations; `Conflict` if one was registered before."""

    def peers(self, *, revoked: bool = False) -> list[Peer]:
        """All keys not revoked; with `revoked` those too, since attempts name who held them."""

    def revoke_peers(self, allocation_id: str, now: float) -> None:
        """Revoke the keys of an allocation that ended."""
