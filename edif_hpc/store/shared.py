"""The part of a store that does not depend on where its rows lie.

`SharedStore` is the skeleton of both implementations: it runs transactions and savepoints, loads
rows, applies `rules`, and writes the rows back through a few small abstract methods, which are all
that an implementation has to supply (besides the plain reads of the port).

Any thread may read. The thread that has a transaction open is remembered, because its reads must
see its own changes; writing outside a transaction is refused, since nothing would make it whole.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

from edif_hpc.domain.allocation import (
    Allocation,
    AllocationEvent,
    AllocationState,
    Peer,
    check_transition,
)
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Token
from edif_hpc.domain.request import Failure, NewRequest, Request, ResultRef
from edif_hpc.errors import Conflict, InvalidInput, NotAuthenticated, NotFound, StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.store import rules
from edif_hpc.store.base import Attempt, Charge, Grant
from edif_hpc.store.orders import OrderChanges
from edif_hpc.store.rules import Change, Stored

ALLOCATION_FACTS: Final = frozenset({"job_id", "node", "cause", "detail"})
DEPLOYMENT_FACTS: Final = frozenset(
    {"replicas", "site", "gpu", "gpus", "walltime_min", "up_at", "limits"}
)


class SharedStore(OrderChanges, ABC):
    """A store whose rows are kept by a subclass."""

    def __init__(self, failpoints: Failpoints | None = None) -> None:
        self._failpoints = failpoints or Failpoints()
        self._turn = threading.Lock()
        self._writing: int | None = None  # ident of the thread with the open transaction
        # What each leased request has, as of the last change; every undoing empties it.
        self._leased: dict[str, Stored] = {}

    # -- transactions ----------------------------------------------------------------------------
    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A group of operations that are committed together on exit, or not at all."""
        if self._inside():
            raise StoreUnavailable("this thread has a transaction open; a second cannot begin")
        with self._turn:
            self._begin()
            self._writing = threading.get_ident()
            try:
                yield
                self._failpoints.hit("store.commit.before")
                self._commit()
            except BaseException:
                self._leased.clear()
                self._rollback()
                raise
            finally:
                self._writing = None
        self._failpoints.hit("store.commit.after")

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """One operation within a transaction; an exception undoes it alone."""
        self._require_transaction()
        mark = self._mark()
        try:
            yield
        except BaseException:
            self._leased.clear()
            self._undo(mark)
            raise
        self._keep(mark)

    def _inside(self) -> bool:
        return self._writing == threading.get_ident()

    def _require_transaction(self) -> None:
        if not self._inside():
            raise StoreUnavailable(
                "changes are made inside `transaction()`, by the thread that opened it; "
                "send the operation through `store.writer.Writer`"
            )

    # -- requests --------------------------------------------------------------------------------
    def accept(self, new: NewRequest, blob: bytes | None) -> Request:
        """RECEIVED → QUEUED."""
        request = self._insert_request(new, blob)
        if request is None:
            raise Conflict(f"the request id {new.id} exists already; send it under a new one")
        return request

    def lease(self, request_id: str, holder: str, now: float) -> Grant:
        """QUEUED → DISPATCHED with the next attempt number."""
        request, attempt = rules.leased(self._stored(request_id), holder, now)
        self._insert_attempt(attempt)
        self._update_request(request)
        self._leased[request_id] = Stored(request=request, newest=attempt)
        return Grant(request=request, blob=self.blob(request_id))

    def start(self, request_id: str, attempt: int, holder: str, now: float) -> Request:
        """DISPATCHED → RUNNING."""
        stored = self._stored(request_id)
        change = rules.started(stored, attempt, holder, now)
        if change is None:
            return stored.request
        started = self._apply(change)
        self._leased[request_id] = Stored(request=started, newest=change.attempt)
        return started

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
        """End a lease without an answer."""
        stored = self._stored(request_id)
        lease = rules.holding(stored, attempt, holder)
        lost = sum(map(rules.took_worker, self.attempts(request_id)))
        return self._apply(
            rules.released(stored, lease, now, end=end, evidence=evidence, workers_lost=lost)
        )

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
        """To COMPLETED, with its result."""
        stored = self._stored(request_id)
        if rules.repeats(stored, attempt, holder, rules.COMPLETED_END):
            return stored.request
        lease = rules.holding(stored, attempt, holder)
        change = rules.completed(stored, lease, now, result=result, inline=inline, meta=meta)
        if inline is not None:
            self._insert_result(request_id, inline)
        return self._apply(change)

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
        """To ERROR by the worker that ran it."""
        stored = self._stored(request_id)
        if rules.repeats(stored, attempt, holder, rules.ERROR_END):
            return stored.request
        lease = rules.holding(stored, attempt, holder)
        return self._apply(rules.failed(stored, lease, now, failure=failure, meta=meta))

    def end(self, request_id: str, now: float, *, failure: Failure) -> Request:
        """To ERROR without a worker."""
        return self._apply(rules.ended(self._stored(request_id), now, failure=failure))

    def forget_result(self, request_id: str, now: float) -> Request:
        """Delete a result, keep its request."""
        request = rules.result_forgotten(self._stored(request_id).request, now)
        self._delete_result(request_id)
        self._update_request(request)
        return request

    def _stored(self, request_id: str) -> Stored:
        self._require_transaction()
        stored = self._leased.get(request_id) or self._load(request_id)
        if stored is None:
            raise NotFound(f"there is no request {request_id}")
        return stored

    def _apply(self, change: Change) -> Request:
        self._leased.pop(change.request.id, None)
        if change.attempt is not None:
            self._update_attempt(change.attempt)
        self._update_request(change.request)
        if change.charge is not None:
            self._insert_charge(change.charge)
            self._delete_blob(change.request.id)
        return change.request

    # -- people ----------------------------------------------------------------------------------
    def add_token(self, token: Token) -> None:
        """Keep a new token."""
        if not self._insert_token(token):
            raise Conflict(f"the token id {token.id} exists already")

    def revoke_token(self, token_id: str, now: float) -> Token:
        """Revoke a token; the first time counts."""
        self._require_transaction()
        token = self._token(token_id)
        if token.revoked_at is not None:
            return token
        self._revoke_token(token_id, now)
        return replace(token, revoked_at=now)

    def limit_token(self, token_id: str, change: Callable[[Allowed], Allowed]) -> Token:
        """Change what a token's requests may use, from now on."""
        self._require_transaction()
        token = self._token(token_id)
        limits = change(token.limits)
        self._limit_token(token_id, limits)
        return replace(token, limits=limits)

    def _token(self, token_id: str) -> Token:
        for each in self.tokens():
            if each.id == token_id:
                return each
        raise NotFound(f"there is no token {token_id}; `edif-hpc token ls` lists them")

    # -- deployments, allocations, peers ---------------------------------------------------------
    def add_deployment(self, deployment: Deployment) -> None:
        """Keep a new deployment."""
        if not self._insert_deployment(deployment):
            raise Conflict(f"a deployment named {deployment.name!r} exists; choose another name")

    def remove_deployment(self, name: str) -> None:
        """Forget a deployment."""
        if not self._delete_deployment(name):
            raise NotFound(f"there is no deployment named {name!r}")

    def change_deployment(self, name: str, **facts: str | float | Allowed | None) -> Deployment:
        """Set what an operator may change of a deployment."""
        self._require_transaction()
        old = next((each for each in self.deployments() if each.name == name), None)
        if old is None:
            raise NotFound(f"there is no deployment named {name!r}")
        _check_names("a deployment", facts, DEPLOYMENT_FACTS)
        new: Deployment = replace(old, **facts)  # type: ignore[arg-type] # names checked above
        self._update_deployment(new)
        return new

    def add_allocation(self, allocation: Allocation, join_sha256: str | None) -> None:
        """Keep a new allocation, its join token's hash and its first event."""
        if not self._insert_allocation(allocation, join_sha256):
            raise Conflict(
                f"allocation {allocation.id}, its join token, or generation "
                f"{allocation.generation} of slot {allocation.deployment}/{allocation.slot} "
                "exists already"
            )
        self._insert_event(_event(allocation, allocation.submitted_at, {}))

    def change_allocation(
        self,
        allocation_id: str,
        now: float,
        *,
        state: AllocationState | None = None,
        **facts: str | float | None,
    ) -> Allocation:
        """Move an allocation along its table, and set facts."""
        old = self._known(allocation_id)
        _check_names("an allocation", facts, ALLOCATION_FACTS)
        new: Allocation = replace(old, **facts)  # type: ignore[arg-type] # names checked above
        if state is not None:
            check_transition(allocation_id, old.state, state)
            new = _moved(new, state, now)
            self._note_state(new, now, facts)
        self._update_allocation(new)
        return new

    def _note_state(
        self, allocation: Allocation, at: float, detail: Mapping[str, str | float | None]
    ) -> None:
        self._insert_event(_event(allocation, at, detail))

    def join(self, join_sha256: str, now: float) -> Allocation:
        """Spend a join token and give its allocation."""
        allocation = self._spend_join(join_sha256, now)
        if allocation is None:
            raise NotAuthenticated(
                "the join token is unknown, was spent, or its allocation has ended; "
                "a token registers one start of one allocation"
            )
        return allocation

    def add_peers(self, peers: Sequence[Peer]) -> None:
        """Register keys."""
        for peer in peers:
            if self._load_allocation(peer.allocation) is None:
                raise NotFound(f"there is no allocation {peer.allocation} for the key {peer.key}")
            if not self._insert_peer(peer):
                raise Conflict(f"the key {peer.key} is registered already; make a fresh pair")

    # -- what a subclass supplies: inserts answer whether the row was new ------------------------
    @abstractmethod
    def _begin(self) -> None: ...
    @abstractmethod
    def _commit(self) -> None: ...
    @abstractmethod
    def _rollback(self) -> None: ...
    @abstractmethod
    def _mark(self) -> Any: ...
    @abstractmethod
    def _undo(self, mark: Any) -> None: ...
    @abstractmethod
    def _keep(self, mark: Any) -> None: ...
    @abstractmethod
    def _load(self, request_id: str) -> Stored | None: ...
    @abstractmethod
    def _insert_request(self, new: NewRequest, blob: bytes | None) -> Request | None: ...
    @abstractmethod
    def _update_request(self, request: Request) -> None: ...
    @abstractmethod
    def _insert_attempt(self, attempt: Attempt) -> None: ...
    @abstractmethod
    def _update_attempt(self, attempt: Attempt) -> None: ...
    @abstractmethod
    def _insert_result(self, request_id: str, inline: bytes) -> None: ...
    @abstractmethod
    def _delete_result(self, request_id: str) -> None: ...
    @abstractmethod
    def _delete_blob(self, request_id: str) -> None: ...
    @abstractmethod
    def _insert_charge(self, charge: Charge) -> None: ...
    @abstractmethod
    def _insert_token(self, token: Token) -> bool: ...
    @abstractmethod
    def _revoke_token(self, token_id: str, now: float) -> None: ...
    @abstractmethod
    def _limit_token(self, token_id: str, limits: Allowed) -> None: ...
    @abstractmethod
    def _insert_deployment(self, deployment: Deployment) -> bool: ...
    @abstractmethod
    def _update_deployment(self, deployment: Deployment) -> None: ...
    @abstractmethod
    def _delete_deployment(self, name: str) -> bool: ...
    @abstractmethod
    def _insert_allocation(self, allocation: Allocation, join_sha256: str | None) -> bool: ...
    @abstractmethod
    def _spend_join(self, join_sha256: str, now: float) -> Allocation | None: ...
    @abstractmethod
    def _insert_peer(self, peer: Peer) -> bool: ...
    @abstractmethod
    def attempts(self, request_id: str) -> list[Attempt]:
        """All leases of a request, the first first."""

    @abstractmethod
    def blob(self, request_id: str) -> bytes | None:
        """A request's blob if it lies in the row."""

    @abstractmethod
    def tokens(self) -> list[Token]:
        """All, the oldest first."""

    @abstractmethod
    def deployments(self) -> list[Deployment]:
        """All, by name."""


def _check_names(what: str, facts: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := sorted(facts.keys() - known):
        raise InvalidInput(f"{unknown} are no facts of {what}; known: {sorted(known)}")


def _moved(allocation: Allocation, state: AllocationState, now: float) -> Allocation:
    match state:
        case AllocationState.STARTED:
            return replace(allocation, state=state, started_at=now)
        case AllocationState.WARM if allocation.warm_at is None:
            return replace(allocation, state=state, warm_at=now)
        case AllocationState.ENDED:
            return replace(allocation, state=state, ended_at=now)
        case _:
            return replace(allocation, state=state)


def _event(allocation: Allocation, at: float, detail: Mapping[str, Any]) -> AllocationEvent:
    return AllocationEvent(
        allocation=allocation.id, at=at, event=str(allocation.state), detail=dict(detail)
    )
