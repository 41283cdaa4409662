"""The roll: deployments, allocations and the keys of their peers, as rows and as their image in memory, written through.

Everything that happens to an allocation happens here: it is made or ordered, its pilot joins, it is noted where it is, told to
drain, and ended. Connected workers are kept with it, because a drain or an end concerns them; who they are follows from the CURVE
key of their connection, never from what they say. `fleet.Fleet` adds what is served with it.
"""

from __future__ import annotations

import math
import secrets
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol

from edif_hpc.clock import Clock
from edif_hpc.domain.allocation import (
    PENDING,
    Allocation,
    AllocationState,
    Peer,
    PeerRole,
    steps_to,
)
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.governor import WINDOW_S
from edif_hpc.domain.people import secret_hash
from edif_hpc.errors import NotFound, TransitionRefused
from edif_hpc.relay.jobs import Jobs
from edif_hpc.relay.seats import Worker
from edif_hpc.store.base import Store
from edif_hpc.store.orders import TAKEN
from edif_hpc.store.writer import Writer

OPERATOR: Final = (
    "up"  #: the holder of orders that an operator submits by hand, on the `local` site
)
_REMEMBERED = 1000


class Hands(Protocol):
    """Those who carry out what is decided here: the gateway and the broker."""

    def drain_worker(self, key: str, reason: str) -> None:
        """Tell a worker to take no more leases and leave."""

    def forget_key(self, key: str) -> None:
        """A key was revoked: refuse its connection from now on."""

    async def end_waiting(self, deployment: str, why: str) -> int:
        """End all requests that wait for a deployment; returns how many."""

    def waiting(self, deployment: str) -> int:
        """How many requests have not ended."""


class Roll:
    """Deployments, allocations, peers and connected workers."""

    def __init__(
        self, *, writer: Writer, store: Store, clock: Clock, endpoint: Mapping[str, str]
    ) -> None:
        self._writer, self._store, self._clock = writer, store, clock
        self._endpoint = endpoint  #: what a pilot needs to dial: endpoint and server_key
        self._deployments: dict[str, Deployment] = {}
        self._allocations: dict[str, Allocation] = {}
        self._peers: dict[str, Peer] = {}
        self._pilots: dict[str, float] = {}  # allocation -> last word of its pilot, monotonic
        self._hands: Hands | None = None
        self.workers: dict[str, Worker] = {}
        self.jobs = Jobs()
        self.past: deque[Allocation] = deque(maxlen=_REMEMBERED)  #: ended, the newest last
        self._taken: dict[str, list[float]] = {}
        self.unwanted: set[str] = set()  #: pending ones that an operator wants cancelled

    def attach(self, hands: Hands) -> None:
        """Join it to those who carry out."""
        self._hands = hands

    def restore(self) -> None:
        """Read the rows; allocations that live are adopted."""
        self._deployments = {each.name: each for each in self._store.deployments()}
        self._peers = {each.key: each for each in self._store.peers()}
        rows = self._store.allocations(live_only=False)
        self._allocations = {each.id: each for each in rows if each.ended_at is None}
        ended = [each for each in rows if each.ended_at is not None]
        self.past.extend(sorted(ended, key=lambda each: each.ended_at or 0.0))
        now = self._clock.monotonic()
        self._pilots = dict.fromkeys(self._allocations, now)
        lately = self._clock.wall() - WINDOW_S
        for row in rows:
            if row.ended_at is None or row.ended_at > lately:
                events = self._store.allocation_events(row.id)
                at = [each.at for each in events if each.event == TAKEN]
                self._taken.setdefault(row.site, []).extend(at)

    # -- deployments ---------------------------------------------------------------------------------------------------

    def deployments(self) -> list[Deployment]:
        """All, by name."""
        return sorted(self._deployments.values(), key=lambda each: each.name)

    def deployment(self, name: str) -> Deployment:
        """The one of that name; `NotFound` names those there are."""
        found = self._deployments.get(name)
        if found is None:
            raise NotFound(
                f"there is no deployment {name!r}; deployed: {', '.join(sorted(self._deployments)) or 'nothing yet'}"
            )
        return found

    async def _change_deployment(self, name: str, **facts: Any) -> Deployment:
        changed = await self._writer.submit(lambda store: store.change_deployment(name, **facts))
        if name in self._deployments:
            self._deployments[name] = changed
        return changed

    # -- allocations ---------------------------------------------------------------------------------------------------

    async def add(
        self,
        deployment: str,
        slot: int,
        *,
        site: str,
        walltime_min: int | None,
        begin_after_s: float = 0.0,
        token: str | None = None,
    ) -> Allocation | None:
        """A row for the next generation of a slot: with a join token it is submitted now, without it is an order.

        None if the slot has all that it may have: one that serves and one that follows.
        """
        allocation_id, now = secrets.token_hex(8), self._clock.wall()

        def op(store: Store) -> Allocation | None:
            place = (deployment, slot)
            every = [each for each in store.allocations(live_only=False) if each.place == place]
            if not _room(every):
                return None
            row = Allocation(
                id=allocation_id,
                deployment=deployment,
                slot=slot,
                generation=max((each.generation for each in every), default=0) + 1,
                site=site,
                state=AllocationState.ORDERED if token is None else AllocationState.SUBMITTED,
                submitted_at=now,
                walltime_min=walltime_min,
                begin_after_s=begin_after_s,
            )
            store.add_allocation(row, None if token is None else secret_hash(token))
            return row

        row = await self._writer.submit(op)
        if row is not None:
            self._allocations[row.id] = row
            self._pilots[row.id] = self._clock.monotonic()
        return row

    async def join(
        self, join_token: str, *, worker_key: str, pilot_key: str, node: str
    ) -> dict[str, Any]:
        """Spend a join token: register the keys that were made on the node.

        The same keys again are answered as before: the first answer was lost on its way.
        """
        known = self._peers.get(worker_key), self._peers.get(pilot_key)
        if known[0] is not None and known[1] is not None:
            return self._joined(self._allocations[known[0].allocation])
        token_hash, now = secret_hash(join_token), self._clock.wall()
        keys = {PeerRole.WORKER: worker_key, PeerRole.PILOT: pilot_key}

        def op(store: Store) -> tuple[Allocation, list[Peer]]:
            allocation = store.join(token_hash, now)
            peers = [_peer(key, role, allocation, now) for role, key in keys.items()]
            store.add_peers(peers)
            return store.change_allocation(
                allocation.id, now, state=AllocationState.STARTED, node=node
            ), peers

        allocation, peers = await self._writer.submit(op)
        self._allocations[allocation.id] = allocation
        self._pilots[allocation.id] = self._clock.monotonic()
        self._peers.update({each.key: each for each in peers})
        return self._joined(allocation)

    def _joined(self, allocation: Allocation) -> dict[str, Any]:
        return {"allocation": allocation, "name": allocation.name, **self._endpoint}

    async def end(
        self, allocation_id: str, *, cause: str, detail: str = "", node: str | None = None
    ) -> None:
        """An allocation is over: revoke its keys and forget its workers. A second end is no error."""
        if allocation_id not in self._allocations:
            return
        now, where = self._clock.wall(), {} if node is None else {"node": node}
        words = detail[-2000:]

        def op(store: Store) -> Allocation:
            ended = store.change_allocation(
                allocation_id, now, state=AllocationState.ENDED, cause=cause, detail=words, **where
            )
            store.revoke_peers(allocation_id, now)
            return ended

        try:
            self.past.append(await self._writer.submit(op))
        except TransitionRefused:
            return  # the first end was under way
        self._allocations.pop(allocation_id, None)
        self._pilots.pop(allocation_id, None)
        self.jobs.forget(allocation_id)
        self.unwanted.discard(allocation_id)
        for key in [key for key, peer in self._peers.items() if peer.allocation == allocation_id]:
            del self._peers[key]
            self._carried_out().forget_key(key)

    async def note(self, allocation_id: str, state: AllocationState, detail: str = "") -> None:
        """A peer told where its allocation is; steps that the table does not list are skipped, never forced.

        Nothing changes here before its commit, and peers say it again, so one that failed is made up for.
        """
        known = self._allocations.get(allocation_id)
        if known is None or known.state is AllocationState.DRAINING:
            return  # it ends next, by `end`
        if known.state is state:
            self._allocations[allocation_id] = replace(known, detail=detail)
            return
        now = self._clock.wall()

        def op(store: Store) -> Allocation:
            row = next((each for each in store.allocations() if each.id == allocation_id), known)
            for step in steps_to(row.state, state):
                row = store.change_allocation(allocation_id, now, state=step, detail=detail)
            return row

        self.adopt(await self._writer.submit(op))

    async def drain(
        self, deployment: str | None, allocation: str | None, *, why: str = "ordered"
    ) -> int:
        """Drain the workers of a deployment or of one allocation; what has not started is cancelled.

        The slots of a deployment that is drained as a whole are not filled again.
        """
        if allocation is None:
            await self._down(deployment)
        hit = [
            each
            for each in self._allocations.values()
            if allocation == each.id
            or (allocation is None and deployment in (None, each.deployment))
        ]
        for each in hit:
            if each.state in PENDING:
                await self._drop(each)
                continue
            # A row, so that a worker that greets later, perhaps another relay process, is told too.
            await self.note(each.id, AllocationState.DRAINING, why)
            for worker in list(self.workers.values()):
                if worker.peer.allocation == each.id:
                    self._carried_out().drain_worker(worker.peer.key, why)
        return len(hit)

    async def _down(self, deployment: str | None) -> None:
        for each in self.deployments():
            if deployment in (None, each.name) and each.up_at is not None:
                await self._change_deployment(each.name, up_at=None)

    async def _drop(self, pending: Allocation) -> None:
        if pending.order_holder in (None, OPERATOR):
            await self.end(pending.id, cause="drained", detail="it had not started")
        else:  # its job waits in a scheduler's queue: a launcher is told to cancel it
            self.unwanted.add(pending.id)

    def allocation(self, allocation_id: str) -> Allocation | None:
        """A live allocation."""
        return self._allocations.get(allocation_id)

    def live(self) -> list[Allocation]:
        """All live allocations."""
        return list(self._allocations.values())

    def history(self) -> Iterable[Allocation]:
        """All that are remembered, the ended ones first."""
        return [*self.past, *self._allocations.values()]

    def taken(self, site: str) -> list[float]:
        """When orders of a site were given out, as far as the rows told it at the start; wall clock."""
        return self._taken.get(site, [])

    def adopt(self, row: Allocation) -> None:
        """A row has changed; one that has ended meanwhile stays ended."""
        if row.id in self._allocations:
            self._allocations[row.id] = row

    def left_s(self, allocation_id: str) -> float | None:
        """How much of its walltime is left: by its pilot, else the listing, else counted from when it joined."""
        left_s = self.jobs.left_s(allocation_id, self._clock.monotonic())
        row = self._allocations.get(allocation_id)
        if left_s is not None or row is None or row.walltime_min is None:
            return left_s
        if row.started_at is None:
            return None
        return max(0.0, row.started_at + 60.0 * row.walltime_min - self._clock.wall())

    async def change(self, allocation_id: str, **facts: Any) -> None:
        """Set facts of an allocation."""
        now = self._clock.wall()
        self.adopt(
            await self._writer.submit(
                lambda store: store.change_allocation(allocation_id, now, **facts)
            )
        )

    # -- peers ---------------------------------------------------------------------------------------------------------

    def peer(self, key: str) -> Peer | None:
        """The record of a public key that is in force."""
        return self._peers.get(key)

    def node(self, key: str) -> str:
        """The short name of the node that a peer is on; empty if it is not known any more."""
        peer = self._peers.get(key)
        allocation = self._allocations.get(peer.allocation) if peer is not None else None
        return (allocation.node or "").partition(".")[0] if allocation is not None else ""

    def worker_keys(self, allocation_id: str) -> list[str]:
        """The keys of an allocation's worker, connected or not."""
        return [
            each.key
            for each in self._peers.values()
            if each.allocation == allocation_id and each.role is PeerRole.WORKER
        ]

    def pilot_spoke(self, allocation_id: str, now: float, left_s: float | None = None) -> None:
        """A pilot lives, and perhaps says how much of its walltime is left."""
        self._pilots[allocation_id] = now
        self.jobs.pilot_told(allocation_id, left_s, now)

    def silence_s(self, allocation_id: str, now: float) -> float:
        """For how long nobody in an allocation has spoken; without end if nobody ever joined."""
        row = self._allocations.get(allocation_id)
        if row is None or row.state in PENDING:
            return math.inf
        heard = [each.heard_at for each in self.workers.values() if each.peer.allocation == row.id]
        return now - max([*heard, self._pilots.get(row.id, -math.inf)])

    # -- inside --------------------------------------------------------------------------------------------------------

    def _carried_out(self) -> Hands:
        if self._hands is None:
            raise RuntimeError("the fleet is not attached to its gateway")
        return self._hands


def _room(allocations: Iterable[Allocation]) -> bool:
    """Whether a slot may have another generation: it has at most one that serves, and none that has not begun."""
    states = [each.state for each in allocations]
    live = [e for e in states if e not in (AllocationState.DRAINING, AllocationState.ENDED)]
    return len(live) < 2 and not PENDING & set(live)


def _peer(key: str, role: PeerRole, allocation: Allocation, now: float) -> Peer:
    return Peer(
        key=key,
        role=role,
        allocation=allocation.id,
        deployment=allocation.deployment,
        slot=allocation.slot,
        generation=allocation.generation,
        created_at=now,
    )
