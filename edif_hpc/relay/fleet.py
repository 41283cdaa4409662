"""The fleet: deployments and what serves them now.

What is stored of it, allocations and keys included, is the `roll`. This adds the deployments that come and go, what is learned
of them, the workers that may be given requests, and the reports of it all.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final

from edif_hpc.clock import Clock
from edif_hpc.domain.allocation import PENDING, Allocation, AllocationState
from edif_hpc.domain.deployment import Deployment, ModelKey, check_name, find_deployment
from edif_hpc.domain.dispatch import END_MARGIN_S, Seat
from edif_hpc.domain.estimate import RunTimes
from edif_hpc.domain.learning import Times
from edif_hpc.domain.limits import Allowed, checked
from edif_hpc.domain.order import ORDER_LEASE_S
from edif_hpc.domain.people import secret_hash
from edif_hpc.domain.request import Provision
from edif_hpc.domain.succession import Decision
from edif_hpc.errors import Conflict, InvalidInput
from edif_hpc.relay import provisioning, reports
from edif_hpc.relay.roll import OPERATOR, Roll
from edif_hpc.relay.seats import Holding, Worker
from edif_hpc.relay.surroundings import surroundings
from edif_hpc.store.base import Store
from edif_hpc.store.writer import Writer

LOST_AFTER_S = 600.0
#: Of an allocation that drains and whose worker has left, only the pilot's goodbye is missing. Longer than a new relay's
#: grace for leases, which a worker that is cut off may still present.
LEFT_AFTER_S = 90.0
#: What is left of a walltime without that margin has to be worth a job.
WORTH_S = 30.0
LOCAL: Final = "local"  #: the site where whoever says `up` submits the jobs himself


class Fleet(Roll):
    """Deployments, allocations, peers and connected workers."""

    def __init__(
        self,
        *,
        writer: Writer,
        store: Store,
        clock: Clock,
        endpoint: Mapping[str, str],
        margin_s: float = END_MARGIN_S,
    ) -> None:
        super().__init__(writer=writer, store=store, clock=clock, endpoint=endpoint)
        self._times: dict[str, RunTimes] = {}
        self._loads: dict[str, float] = {}  # deployment -> seconds of its last load
        self.margin_s = margin_s  #: so long before the end of its walltime a worker is left alone
        self.expected: Mapping[str, Times] = {}  #: of each deployment; set by `Slots`
        self.decisions: Mapping[tuple[str, int], Decision] = {}  #: of each slot; set by `Slots`

    def restore(self) -> None:
        """Read the rows; allocations that live are adopted."""
        super().restore()
        for name in self._deployments:
            self._times[name] = RunTimes(self._store.run_seconds(name))
        self._loads = provisioning.last_loads(self._store)

    # -- deployments ---------------------------------------------------------------------------------------------------

    def find(self, key: ModelKey) -> Deployment:
        """The deployment that serves a model key."""
        return find_deployment(key, self._deployments.values())

    async def add_deployment(self, deployment: Deployment) -> None:
        """Add one; `Conflict` if its name is taken or another one serves the same key."""
        check_name(deployment.name)
        for other in self._deployments.values():
            for key in deployment.model_keys:
                if other.serves(key):
                    raise Conflict(
                        f"the deployment {other.name} serves {key.repo_id} (task {key.task}) already"
                    )
        stamped = replace(deployment, created_at=self._clock.wall())
        await self._writer.submit(lambda store: store.add_deployment(stamped))
        self._deployments[deployment.name] = stamped
        self._times[deployment.name] = RunTimes([])

    async def remove_deployment(self, name: str, *, force: bool) -> int:
        """Remove one and drain its workers; waiting requests are ended if `force`, else they forbid it."""
        self.deployment(name)
        hands = self._carried_out()
        waiting = hands.waiting(name)
        if waiting and not force:
            raise Conflict(
                f"{waiting} request(s) of {name} have not ended; wait, or remove it with --force, which ends them"
            )
        await self._writer.submit(lambda store: store.remove_deployment(name))
        self._deployments.pop(name, None)
        await self.drain(name, None)
        return await hands.end_waiting(name, f"the deployment {name} was removed by an operator")

    def times(self, deployment: str) -> RunTimes:
        """Learned run times of a deployment."""
        return self._times.setdefault(deployment, RunTimes([]))

    def provision(self, deployment: str) -> tuple[Provision, str]:
        """What serves a deployment now, and a few words on it for those who wait."""
        return provisioning.provision(
            deployment,
            workers=self.workers.values(),
            allocations=self._allocations.values(),
            jobs=self.jobs,
            last_load_s=self._loads.get(deployment),
            now=self._clock.monotonic(),
            wall=self._clock.wall(),
        )

    def loaded(self, deployment: str, load_s: float) -> None:
        """A worker became warm; the next one is expected to take as long."""
        self._loads[deployment] = load_s

    # -- what an operator says -------------------------------------------------------------------------------------------

    async def allocate(
        self,
        deployment: str,
        *,
        site: str,
        slots: int | None = None,
        walltime_min: int | None = None,
        gpu: str | None = None,
        gpus: int | None = None,
    ) -> list[dict[str, Any]]:
        """An operator wants a deployment up.

        On the `local` site the operator submits: this makes the allocations of the slots that have none, each with its
        one-time join token. With a walltime, and on any other site, the relay keeps the slots filled from now on.
        """
        known = self.deployment(deployment)
        walltime_min = known.walltime_min if walltime_min is None else walltime_min
        if site != LOCAL and walltime_min is None:
            raise InvalidInput(
                f"the jobs of {deployment} at {site} need a walltime; say how long one may run: --walltime"
            )
        if walltime_min is not None:
            self._check_walltime(walltime_min)
            facts = {"walltime_min": walltime_min, "gpu": gpu, "gpus": gpus, "replicas": slots}
            said = {name: fact for name, fact in facts.items() if fact is not None}
            await self._change_deployment(deployment, site=site, up_at=self._clock.wall(), **said)
        if site != LOCAL:
            return []
        wanted = slots if slots is not None else self.deployment(deployment).replicas
        return await self._allocate_here(deployment, wanted, walltime_min)

    def _check_walltime(self, walltime_min: int) -> None:
        """Else job follows job, and each leaves as soon as it is warm."""
        least_s = self.margin_s + WORTH_S
        if 60.0 * walltime_min <= least_s:
            raise InvalidInput(
                f"a walltime of {walltime_min} min serves nobody: workers leave {self.margin_s:g} s before its end "
                f"(end_margin_s of the relay); ask for {math.floor(least_s / 60.0) + 1} min or more"
            )

    async def scale(self, deployment: str, replicas: int) -> None:
        """An operator wants another number of replicas; workers that are too many leave.

        Slots of allocations with a walltime follow by themselves (`relay.slots`); those without one are let go here.
        """
        self.deployment(deployment)
        await self._change_deployment(deployment, replicas=replicas)
        for row in self.live():
            if row.deployment == deployment and row.slot >= replicas and row.walltime_min is None:
                await self.drain(None, row.id, why="not wanted any more")

    async def limit(self, deployment: str, change: Callable[[Allowed], Allowed]) -> Deployment:
        """An operator wants other limits for the requests that come from now on."""
        new = checked(change(self.deployment(deployment).limits))
        return await self._change_deployment(deployment, limits=new)

    async def _allocate_here(
        self, deployment: str, wanted: int, walltime_min: int | None
    ) -> list[dict[str, Any]]:
        mine = [each for each in self._allocations.values() if each.deployment == deployment]
        made = [
            await self._take_over(each)
            for each in mine
            if each.state is AllocationState.ORDERED
            and each.site == LOCAL
            and each.order_holder in (None, OPERATOR)
        ]
        taken = {each.slot for each in mine}
        for slot in (each for each in range(wanted) if each not in taken):
            token = secrets.token_urlsafe(32)
            row = await self.add(
                deployment, slot, site=LOCAL, walltime_min=walltime_min, token=token
            )
            if row is not None:
                made.append({"allocation": row, "name": row.name, "join_token": token})
        return made

    async def _take_over(self, order: Allocation) -> dict[str, Any]:
        token, now = secrets.token_urlsafe(32), self._clock.wall()
        row = await self._writer.submit(
            lambda store: store.take_order(
                order.id, OPERATOR, now, lease_s=ORDER_LEASE_S, join_sha256=secret_hash(token)
            )
        )
        self.adopt(row)
        return {"allocation": row, "name": row.name, "join_token": token}

    async def submitted(self, allocation_id: str, *, job_id: str) -> None:
        """The scheduler took it under this id."""
        known = self._allocations.get(allocation_id)
        if known is None or known.state is not AllocationState.ORDERED:
            await self.change(allocation_id, job_id=job_id)
            return
        now, holder = self._clock.wall(), known.order_holder or OPERATOR
        self.adopt(
            await self._writer.submit(
                lambda store: store.submit_order(allocation_id, holder, job_id, now)
            )
        )

    async def failed(self, allocation_id: str, *, cause: str, detail: str) -> None:
        """It never started, or it ended."""
        await self.end(allocation_id, cause=cause, detail=detail)

    # -- workers ---------------------------------------------------------------------------------------------------------

    def lost(self, now: float) -> list[str]:
        """Allocations whose pilot and worker have both been silent for longer than can be explained."""
        heard = dict(self._pilots)
        for worker in self.workers.values():
            heard[worker.peer.allocation] = max(
                heard.get(worker.peer.allocation, 0.0), worker.heard_at
            )
        return [
            each.id
            for each in self._allocations.values()
            if each.state not in PENDING and now - heard.get(each.id, now) > self._patience_s(each)
        ]

    def _patience_s(self, row: Allocation) -> float:
        served = any(each.peer.allocation == row.id for each in self.workers.values())
        drained = row.state is AllocationState.DRAINING and not served
        return LEFT_AFTER_S if drained else LOST_AFTER_S

    def forgive(self, now: float) -> None:
        """The relay itself was late: nobody's silence until now counts."""
        for worker in self.workers.values():
            worker.heard_at = now
        self._pilots = dict.fromkeys(self._pilots, now)

    def seat(self, worker: Worker, now: float) -> Seat:
        """A worker as `domain.dispatch` sees it, with what is left of its walltime."""
        return worker.seat(
            now,
            self.times(worker.peer.deployment),
            left_s=self.left_s(worker.peer.allocation),
            margin_s=self.margin_s,
        )

    def longest_run_s(self, deployment: str) -> float:
        """The longest run that fits into one walltime of a deployment, after its model is loaded; else without end."""
        known = self._deployments.get(deployment)
        if known is None or known.walltime_min is None:
            return math.inf
        walltime_s = 60.0 * known.walltime_min
        loading_s = self.expected.get(deployment, Times()).warmup_s
        return max(walltime_s / 4, walltime_s - loading_s - self.margin_s)

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

    def surroundings(self) -> list[dict[str, Any]]:
        """What requests find, by deployment; for `edif-hpc env`."""
        return surroundings(self.deployments(), self.workers.values())

    def processes(self) -> list[dict[str, Any]]:
        """One line an allocation, for `ps`."""
        now = self._clock.monotonic()
        lines = reports.processes(self._allocations.values(), self.workers.values(), now)
        return [line | self._prospects(line["allocation"], now) for line in lines]

    def _lead_s(self, row: Allocation) -> float | None:
        """How long before the end of an allocation its successor is ordered; None if nobody wants one."""
        known, times = self._deployments.get(row.deployment), self.expected.get(row.deployment)
        if known is None or known.up_at is None or known.walltime_min is None or times is None:
            return None
        return times.lead_s if row.slot < known.replicas else None

    def _prospects(self, allocation_id: str, now: float) -> dict[str, Any]:
        row = self._allocations[allocation_id]
        decision = self.decisions.get(row.place)
        return reports.prospects(
            row,
            self.jobs.of(allocation_id),
            left_s=self.left_s(allocation_id),
            start_in_s=self.jobs.start_in_s(allocation_id, now),
            decision=decision,
            lead_s=self._lead_s(row),
            others=self._allocations.values(),
        )
