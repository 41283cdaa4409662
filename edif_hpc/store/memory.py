"""The queue in memory: the shipped fake, held to the same contract suite as the real store.

The rows are immutable values in plain dictionaries (`Tables`). A transaction works on a copy and
puts it in place of the committed tables at its end; a savepoint remembers the tables as they were.
So undoing is exact by construction, and other threads see only what was committed.

Nothing survives the process: it is for tests and for trying things out, never for a service.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from edif_hpc.domain.allocation import Allocation, AllocationEvent, Peer
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Token
from edif_hpc.domain.request import NewRequest, Request, RequestState
from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.store import rules
from edif_hpc.store.base import Attempt, Charge
from edif_hpc.store.rows import as_stored
from edif_hpc.store.shared import SharedStore


@dataclass(kw_only=True)
class Tables:
    """All rows. The dictionaries are replaced by copies; the values in them never change."""

    requests: dict[str, Request] = field(default_factory=dict)
    attempts: dict[str, tuple[Attempt, ...]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    results: dict[str, bytes] = field(default_factory=dict)
    charges: dict[str, Charge] = field(default_factory=dict)
    tokens: dict[str, Token] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)
    allocations: dict[str, Allocation] = field(default_factory=dict)
    joins: dict[str, str] = field(default_factory=dict)  # hash of a join token -> allocation
    spent: dict[str, float] = field(default_factory=dict)  # hash of a join token -> when
    events: dict[str, tuple[AllocationEvent, ...]] = field(default_factory=dict)
    peers: dict[str, Peer] = field(default_factory=dict)

    def copy(self) -> Tables:
        """The same rows in dictionaries of their own."""
        return Tables(**{each.name: dict(getattr(self, each.name)) for each in fields(self)})


class MemoryStore(SharedStore):
    """The queue in dictionaries."""

    def __init__(self, failpoints: Failpoints | None = None) -> None:
        super().__init__(failpoints)
        self._committed = Tables()
        self._draft: Tables | None = None
        self._is_open = False

    def open(self) -> None:
        """Begin to serve; rows from before a `close` are still there."""
        self._is_open = True

    def close(self) -> None:
        """Stop serving."""
        self._is_open = False

    # -- transactions ----------------------------------------------------------------------------
    def _begin(self) -> None:
        self._require_open()
        self._draft = self._committed.copy()

    def _commit(self) -> None:
        self._committed = self._changing()
        self._draft = None

    def _rollback(self) -> None:
        self._draft = None

    def _mark(self) -> Tables:
        return self._changing().copy()

    def _undo(self, mark: Tables) -> None:
        self._draft = mark

    def _keep(self, mark: Tables) -> None:
        pass

    def _require_open(self) -> None:
        if not self._is_open:
            raise StoreUnavailable("the store in memory is not open")

    def _changing(self) -> Tables:
        self._require_open()
        self._require_transaction()
        if self._draft is None:
            raise StoreUnavailable("the transaction has been undone; try again")
        return self._draft

    def _reading(self) -> Tables:
        self._require_open()
        return self._changing() if self._inside() else self._committed

    # -- rows of requests ------------------------------------------------------------------------
    def _load(self, request_id: str) -> rules.Stored | None:
        tables = self._reading()
        request = tables.requests.get(request_id)
        if request is None:
            return None
        attempts = tables.attempts.get(request_id, ())
        return rules.Stored(request=request, newest=attempts[-1] if attempts else None)

    def _insert_request(self, new: NewRequest, blob: bytes | None) -> Request | None:
        tables = self._changing()
        if new.id in tables.requests:
            return None
        plain = replace(new, env=as_stored(new.env), client=as_stored(new.client))
        request = rules.accepted(plain, len(tables.requests) + 1)
        tables.requests[new.id] = request
        if blob is not None:
            tables.blobs[new.id] = blob
        return request

    def _update_request(self, request: Request) -> None:
        failure = request.failure
        if failure is not None:
            failure = replace(failure, details=as_stored(failure.details))
        self._changing().requests[request.id] = replace(
            request, meta=as_stored(request.meta), failure=failure
        )

    def _insert_attempt(self, attempt: Attempt) -> None:
        attempts = self._changing().attempts
        attempts[attempt.request_id] = (*attempts.get(attempt.request_id, ()), attempt)

    def _update_attempt(self, attempt: Attempt) -> None:
        attempts = self._changing().attempts
        kept = attempts[attempt.request_id][:-1]  # only the newest ever changes
        plain = replace(attempt, evidence=as_stored(attempt.evidence))
        attempts[attempt.request_id] = (*kept, plain)

    def _insert_result(self, request_id: str, inline: bytes) -> None:
        self._changing().results[request_id] = inline

    def _delete_result(self, request_id: str) -> None:
        self._changing().results.pop(request_id, None)

    def _delete_blob(self, request_id: str) -> None:
        self._changing().blobs.pop(request_id, None)

    def _insert_charge(self, charge: Charge) -> None:
        self._changing().charges[charge.request_id] = charge

    # -- reads of requests -----------------------------------------------------------------------
    def get(self, request_id: str) -> Request | None:
        """One request, or None."""
        return self._reading().requests.get(request_id)

    def open_requests(self) -> list[Request]:
        """All that have not ended, by seq."""
        return [each for each in self._by_seq() if not each.terminal]

    def requests(
        self,
        *,
        owner: str | None = None,
        states: Iterable[RequestState] = (),
        limit: int = 100,
        before_seq: int | None = None,
    ) -> list[Request]:
        """The newest first; no `states` means all."""
        wanted = frozenset(states) or frozenset(RequestState)
        found = [
            each
            for each in self._by_seq()
            if (owner is None or each.owner == owner)
            and (before_seq is None or each.seq < before_seq)
            and each.state in wanted
        ]
        return found[::-1][:limit]

    def _by_seq(self) -> Iterator[Request]:
        # Rows are added in the order of acceptance, and a dictionary keeps it.
        return iter(tuple(self._reading().requests.values()))

    def blob(self, request_id: str) -> bytes | None:
        """A request's blob if it lies in the row."""
        return self._reading().blobs.get(request_id)

    def inline_result(self, request_id: str) -> bytes | None:
        """A result's bytes if they lie in the row."""
        return self._reading().results.get(request_id)

    def attempts(self, request_id: str) -> list[Attempt]:
        """All leases of a request, the first first."""
        return list(self._reading().attempts.get(request_id, ()))

    def charges(self, *, owner: str | None = None) -> list[Charge]:
        """What ended requests cost, the oldest first."""
        found = [each for each in self._reading().charges.values() if owner in (None, each.owner)]
        return sorted(found, key=lambda each: (each.at, each.request_id))

    def ended_before(self, at: float, *, limit: int) -> list[Request]:
        """COMPLETED requests whose result is due for deletion, the oldest first."""
        due = [
            (each.ended_at, each.seq, each)
            for each in self._by_seq()
            if each.result is not None
            and each.result.deleted_at is None
            and each.ended_at is not None
            and each.ended_at < at
        ]
        return [each for _, _, each in sorted(due, key=lambda item: item[:2])[:limit]]

    def run_seconds(self, deployment: str, *, limit: int = 200) -> list[float]:
        """Run times of the newest requests of a deployment that ran."""
        found = [each for each in self.charges() if each.deployment == deployment and each.run_s]
        return [each.run_s for each in found[::-1][:limit]]

    # -- people ----------------------------------------------------------------------------------
    def _insert_token(self, token: Token) -> bool:
        return self._changing().tokens.setdefault(token.id, token) is token

    def _revoke_token(self, token_id: str, now: float) -> None:
        tokens = self._changing().tokens
        tokens[token_id] = replace(tokens[token_id], revoked_at=now)

    def _limit_token(self, token_id: str, limits: Allowed) -> None:
        tokens = self._changing().tokens
        tokens[token_id] = replace(tokens[token_id], limits=limits)

    def tokens(self) -> list[Token]:
        """All, the oldest first."""
        found = self._reading().tokens.values()
        return sorted(found, key=lambda each: (each.created_at, each.id))

    # -- deployments, allocations, peers ---------------------------------------------------------
    def _insert_deployment(self, deployment: Deployment) -> bool:
        return self._changing().deployments.setdefault(deployment.name, deployment) is deployment

    def _update_deployment(self, deployment: Deployment) -> None:
        self._changing().deployments[deployment.name] = deployment

    def _delete_deployment(self, name: str) -> bool:
        return self._changing().deployments.pop(name, None) is not None

    def deployments(self) -> list[Deployment]:
        """All, by name."""
        return sorted(self._reading().deployments.values(), key=lambda each: each.name)

    def _insert_allocation(self, allocation: Allocation, join_sha256: str | None) -> bool:
        tables = self._changing()
        places = {_place(each) for each in tables.allocations.values()}
        if (
            allocation.id in tables.allocations
            or join_sha256 in tables.joins
            or _place(allocation) in places
        ):
            return False
        tables.allocations[allocation.id] = allocation
        if join_sha256 is not None:
            tables.joins[join_sha256] = allocation.id
        return True

    def _load_allocation(self, allocation_id: str) -> Allocation | None:
        return self._reading().allocations.get(allocation_id)

    def _update_allocation(self, allocation: Allocation) -> None:
        self._changing().allocations[allocation.id] = allocation

    def _set_join(self, allocation_id: str, join_sha256: str | None) -> bool:
        joins = self._changing().joins
        if join_sha256 is not None and joins.get(join_sha256, allocation_id) != allocation_id:
            return False
        for old in [token for token, known in joins.items() if known == allocation_id]:
            del joins[old]
        if join_sha256 is not None:
            joins[join_sha256] = allocation_id
        return True

    def allocations(self, *, live_only: bool = True) -> list[Allocation]:
        """Oldest first."""
        found = [
            each
            for each in self._reading().allocations.values()
            if each.ended_at is None or not live_only
        ]
        return sorted(found, key=lambda each: (each.submitted_at, each.id))

    def _insert_event(self, event: AllocationEvent) -> None:
        events = self._changing().events
        plain = replace(event, detail=as_stored(event.detail))
        events[event.allocation] = (*events.get(event.allocation, ()), plain)

    def allocation_events(self, allocation_id: str) -> list[AllocationEvent]:
        """Oldest first."""
        return list(self._reading().events.get(allocation_id, ()))

    def _spend_join(self, join_sha256: str, now: float) -> Allocation | None:
        tables = self._changing()
        allocation = tables.allocations.get(tables.joins.get(join_sha256, ""))
        if allocation is None or allocation.ended_at is not None or join_sha256 in tables.spent:
            return None
        tables.spent[join_sha256] = now
        return allocation

    def _insert_peer(self, peer: Peer) -> bool:
        return self._changing().peers.setdefault(peer.key, peer) is peer

    def peers(self, *, revoked: bool = False) -> list[Peer]:
        """All keys not revoked; with `revoked` those too."""
        every = self._reading().peers.values()
        found = [each for each in every if revoked or each.revoked_at is None]
        return sorted(found, key=lambda each: (each.created_at, each.key))

    def revoke_peers(self, allocation_id: str, now: float) -> None:
        """Revoke the keys of an allocation that ended."""
        peers = self._changing().peers
        for peer in self.peers():
            if peer.allocation == allocation_id:
                peers[peer.key] = replace(peer, revoked_at=now)


def _place(allocation: Allocation) -> tuple[Any, ...]:
    return (allocation.deployment, allocation.slot, allocation.generation)
