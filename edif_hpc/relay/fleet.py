"""The fleet: deployments, the allocations that serve them, and the peers that are connected now.

Deployments, allocations and keys are rows; this is their view in memory, written through. Connected workers exist only
here: who they are follows from the CURVE key of their connection, never from what they say.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from edif_hpc.clock import Clock
from edif_hpc.domain.allocation import (
    Allocation,
    AllocationState,
    Peer,
    PeerRole,
    steps_to,
)
from edif_hpc.domain.deployment import Deployment, ModelKey, check_name, find_deployment
from edif_hpc.domain.estimate import RunTimes
from edif_hpc.domain.people import secret_hash
from edif_hpc.domain.request import Provision
from edif_hpc.errors import Conflict, NotFound
from edif_hpc.relay import reports
from edif_hpc.relay.seats import Holding, Worker
from edif_hpc.store.base import Store
from edif_hpc.store.writer import Writer

LOST_AFTER_S = 600.0


class Orders(Protocol):
    """What the fleet asks of the gateway and of the broker."""

    def drain_worker(self, key: str, reason: str) -> None:
        """Tell a worker to take no more leases and leave."""

    def forget_key(self, key: str) -> None:
        """A key was revoked: refuse its connection from now on."""

    async def end_waiting(self, deployment: str, why: str) -> int:
        """End all requests that wait for a deployment; returns how many."""

    def waiting(self, deployment: str) -> int:
        """How many requests have not ended."""


class Fleet:
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
        self._times: dict[str, RunTimes] = {}
        self.workers: dict[str, Worker] = {}
        self._orders: Orders | None = None

    def attach(self, orders: Orders) -> None:
        """Join the fleet to those who carry out its orders."""
        self._orders = orders

    def restore(self) -> None:
        """Read the rows; allocations that live are adopted."""
        self._deployments = {each.name: each for each in self._store.deployments()}
        self._allocations = {each.id: each for each in self._store.allocations()}
        self._peers = {each.key: each for each in self._store.peers()}
        now = self._clock.monotonic()
        self._pilots = dict.fromkeys(self._allocations, now)
        for name in self._deployments:
            self._times[name] = RunTimes(self._store.run_seconds(name))

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

    def find(self, key: ModelKey) -> Deployment:
        """The deployment that serves a model key."""
        return find_deployment(key, self._deployments.values())

    async def add_deployment(self, deployment: Deployment) -> None:
        """Add one; `Conflict` if its name is taken or another one serves the same key."""
        check_name(deployment.name)
        for other in self._deployments.values():
            if other.serves(deployment.model_key):
                raise Conflict(
                    f"the deployment {other.name} serves {deployment.repo_id} (task {deployment.task}) already"
                )
        stamped = replace(deployment, created_at=self._clock.wall())
        await self._writer.submit(lambda store: store.add_deployment(stamped))
        self._deployments[deployment.name] = stamped
        self._times[deployment.name] = RunTimes([])

    async def remove_deployment(self, name: str, *, force: bool) -> int:
        """Remove one and drain its workers; waiting requests are ended if `force`, else they forbid it."""
        self.deployment(name)
        orders = self._carried_out()
        waiting = orders.waiting(name)
        if waiting and not force:
            raise Conflict(
                f"{waiting} request(s) of {name} have not ended; wait, or remove it with --force, which ends them"
            )
        await self._writer.submit(lambda store: store.remove_deployment(name))
        self._deployments.pop(name, None)
        await self.drain(name, None)
        return await orders.end_waiting(name, f"the deployment {name} was removed by an operator")

    def times(self, deployment: str) -> RunTimes:
        """Learned run times of a deployment."""
        return self._times.setdefault(deployment, RunTimes([]))

    def provision(self, deployment: str) -> tuple[Provision, str]:
        """What serves a deployment now, and a few words on it for those who wait."""
        workers = [
            each
            for each in self.workers.values()
            if each.peer.deployment == deployment and not each.draining
        ]
        if any(each.serves for each in workers):
            return Provision.WARM, ""
        for each in workers:
            share = f" {each.progress:.0%}" if each.progress is not None else ""
            return Provision.LOADING, f"{each.detail or 'the worker loads the model'}{share}"
        live = [each for each in self._allocations.values() if each.deployment == deployment]
        if any(each.state is not AllocationState.SUBMITTED for each in live):
            return Provision.LOADING, "the worker starts"
        if live:
            return Provision.PENDING, f"allocation {live[0].name} waits to start"
        return (
            Provision.NONE,
            "no allocation serves this model; an operator starts one with `edif-hpc up`",
        )

    # -- allocations ---------------------------------------------------------------------------------------------------

    async def allocate(
        self, deployment: str, *, site: str, slots: int | None = None
    ) -> list[dict[str, Any]]:
        """New allocations for the slots that have none, each with its one-time join token."""
        wanted = slots if slots is not None else self.deployment(deployment).replicas
        taken = {each.slot for each in self._allocations.values() if each.deployment == deployment}
        past = await self._writer.submit(lambda store: store.allocations(live_only=False))
        made = []
        for slot in (each for each in range(wanted) if each not in taken):
            older = [
                each.generation
                for each in past
                if (each.deployment, each.slot) == (deployment, slot)
            ]
            made.append(await self._allocate(deployment, slot, max(older, default=0) + 1, site))
        return made

    async def _allocate(
        self, deployment: str, slot: int, generation: int, site: str
    ) -> dict[str, Any]:
        allocation = Allocation(
            id=secrets.token_hex(8),
            deployment=deployment,
            slot=slot,
            generation=generation,
            site=site,
            state=AllocationState.SUBMITTED,
            submitted_at=self._clock.wall(),
        )
        token = secrets.token_urlsafe(32)
        await self._writer.submit(
            lambda store: store.add_allocation(allocation, secret_hash(token))
        )
        self._allocations[allocation.id] = allocation
        self._pilots[allocation.id] = self._clock.monotonic()
        return {"allocation": allocation, "name": allocation.name, "join_token": token}

    async def submitted(self, allocation_id: str, *, job_id: str) -> None:
        """The scheduler took it under this id."""
        await self._change(allocation_id, job_id=job_id)

    async def failed(self, allocation_id: str, *, cause: str, detail: str) -> None:
        """It never started, or it ended."""
        await self.end(allocation_id, cause=cause, detail=detail)

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

        def op(store: Store) -> tuple[Allocation, list[Peer]]:
            keys = {PeerRole.WORKER: worker_key, PeerRole.PILOT: pilot_key}
            allocation = store.join(token_hash, now)
            peers = [
                Peer(
                    key=key,
                    role=role,
                    allocation=allocation.id,
                    deployment=allocation.deployment,
                    slot=allocation.slot,
                    generation=allocation.generation,
                    created_at=now,
                )
                for role, key in keys.items()
            ]
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

    async def end(self, allocation_id: str, *, cause: str, detail: str = "") -> None:
        """An allocation is over: revoke its keys and forget its workers. A second end is no error."""
        if allocation_id not in self._allocations:
            return
        now = self._clock.wall()

        def op(store: Store) -> None:
            store.change_allocation(
                allocation_id, now, state=AllocationState.ENDED, cause=cause, detail=detail[-2000:]
            )
            store.revoke_peers(allocation_id, now)

        await self._writer.submit(op)
        self._allocations.pop(allocation_id, None)
        self._pilots.pop(allocation_id, None)
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

        changed = await self._writer.submit(op)
        if allocation_id in self._allocations:
            self._allocations[allocation_id] = changed

    async def drain(self, deployment: str | None, allocation: str | None) -> int:
        """Drain the workers of a deployment or of one allocation; allocations that never started are ended."""
        hit = [
            each
            for each in self._allocations.values()
            if allocation == each.id
            or (allocation is None and deployment in (None, each.deployment))
        ]
        for each in hit:
            if each.state is AllocationState.SUBMITTED:
                await self.end(each.id, cause="drained", detail="it had not started")
                continue
            # A row, so that a worker that greets later, perhaps another relay process, is told too.
            await self.note(each.id, AllocationState.DRAINING, "ordered")
            for worker in list(self.workers.values()):
                if worker.peer.allocation == each.id:
                    self._carried_out().drain_worker(worker.peer.key, "ordered")
        return len(hit)

    def allocation(self, allocation_id: str) -> Allocation | None:
        """A live allocation."""
        return self._allocations.get(allocation_id)

    # -- peers ---------------------------------------------------------------------------------------------------------

    def peer(self, key: str) -> Peer | None:
        """The record of a public key that is in force."""
        return self._peers.get(key)

    def worker_keys(self, allocation_id: str) -> list[str]:
        """The keys of an allocation's worker, connected or not."""
        return [
            each.key
            for each in self._peers.values()
            if each.allocation == allocation_id and each.role is PeerRole.WORKER
        ]

    def pilot_spoke(self, allocation_id: str, now: float) -> None:
        """A pilot lives."""
        self._pilots[allocation_id] = now

    def lost(self, now: float) -> list[str]:
        """Allocations whose pilot and worker have both been silent for `LOST_AFTER_S`."""
        heard = dict(self._pilots)
        for worker in self.workers.values():
            heard[worker.peer.allocation] = max(
                heard.get(worker.peer.allocation, 0.0), worker.heard_at
            )
        return [
            each.id
            for each in self._allocations.values()
            if each.state is not AllocationState.SUBMITTED
            and now - heard.get(each.id, now) > LOST_AFTER_S
        ]

    def forgive(self, now: float) -> None:
        """The relay itself was late: nobody's silence until now counts."""
        for worker in self.workers.values():
            worker.heard_at = now
        self._pilots = dict.fromkeys(self._pilots, now)

    def serving(self, deployment: str) -> list[Worker]:
        """Workers that may be given requests of a deployment."""
        return [
            each
            for each in self.workers.values()
            if each.peer.deployment == deployment and each.serves
        ]

    def let_go(self, key: str, request_id: str, attempt: int) -> Holding | None:
        """A worker does not hold this lease any more; what its record had of it."""
        worker = self.workers.get(key)
        holding = worker.leases.get(request_id) if worker is not None else None
        if worker is None or holding is None or holding.attempt != attempt:
            return None
        return worker.leases.pop(request_id)

    def hold(self, key: str, request_id: str, holding: Holding) -> None:
        """A worker holds this lease after all."""
        if key in self.workers:
            self.workers[key].leases.setdefault(request_id, holding)

    # -- reports -------------------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """The entries of nnsight's `/status`."""
        provisions = {name: self.provision(name) for name in self._deployments}
        return reports.nnsight_status(self.deployments(), self.workers.values(), provisions)

    def environment(self) -> dict[str, Any]:
        """The body of nnsight's `/env`."""
        return reports.environment(self.workers.values())

    def processes(self) -> list[dict[str, Any]]:
        """One line an allocation, for `ps`."""
        return reports.processes(
            self._allocations.values(), self.workers.values(), self._clock.monotonic()
        )

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _change(self, allocation_id: str, **facts: Any) -> None:
        now = self._clock.wall()
        changed = await self._writer.submit(
            lambda store: store.change_allocation(allocation_id, now, **facts)
        )
        if allocation_id in self._allocations:
            self._allocations[allocation_id] = changed

    def _carried_out(self) -> Orders:
        if self._orders is None:
            raise RuntimeError("the fleet is not attached to its gateway")
        return self._orders
