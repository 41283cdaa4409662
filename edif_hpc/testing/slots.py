"""The relay's slots without sockets and threads: fleet, orders and slots over a store in memory and a clock that a test moves.

relay = SlotRelay()
async with ...:                      # any running loop
    relay.start()                    # again: the relay was started anew on what it had stored
    await relay.deploy(replicas=2, walltime_min=60)
    await relay.slots.reconcile()
    orders = await relay.orders.fetch("hpc", "login1", 4)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from edif_hpc.domain.allocation import Allocation, AllocationState
from edif_hpc.domain.deployment import Deployment
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.governing import Governing
from edif_hpc.relay.jobs import JobLine
from edif_hpc.relay.orders import Orders
from edif_hpc.relay.slots import Slots
from edif_hpc.store.memory import MemoryStore
from edif_hpc.testing.clock import ManualClock
from edif_hpc.testing.writer import SteppedWriter

SITE, NAME = "hpc", "tiny"
SILENT_S = 30.0


class NoHands:
    """Nobody is connected."""

    def __init__(self) -> None:
        self.drained: list[tuple[str, str]] = []

    def drain_worker(self, key: str, reason: str) -> None:
        """Remember it."""
        self.drained.append((key, reason))

    def forget_key(self, key: str) -> None:
        """Nothing is connected by it."""

    async def end_waiting(self, _deployment: str, _why: str) -> int:
        """No request waits."""
        return 0

    def waiting(self, _deployment: str) -> int:
        """No request waits."""
        return 0


@dataclass
class SlotRelay:
    """The relay's parts that keep slots filled."""

    submits: int = 4
    clock: ManualClock = field(default_factory=ManualClock)
    store: MemoryStore = field(default_factory=MemoryStore)
    hands: NoHands = field(default_factory=NoHands)
    fleet: Fleet = field(init=False)
    orders: Orders = field(init=False)
    slots: Slots = field(init=False)

    def start(self) -> None:
        """Begin on what is stored, on the running loop."""
        self.store.open()
        writer = SteppedWriter(self.store)
        writer.start()
        self.fleet = Fleet(writer=writer, store=self.store, clock=self.clock, endpoint={})
        self.fleet.attach(self.hands)
        self.fleet.restore()
        governing = Governing(
            history=self.fleet.history,
            deployments=self.fleet.deployments,
            taken=self.fleet.taken,
            clock=self.clock,
            submits=self.submits,
        )
        self.orders = Orders(
            writer=writer,
            roll=self.fleet,
            jobs=self.fleet.jobs,
            governing=governing,
            clock=self.clock,
            silent_s=SILENT_S,
        )
        self.slots = Slots(
            fleet=self.fleet, orders=self.orders, governing=governing, clock=self.clock
        )

    async def deploy(self, *, replicas: int = 1, walltime_min: int = 60, site: str = SITE) -> None:
        """Add the deployment, and want it up."""
        await self.fleet.add_deployment(
            Deployment(
                name=NAME,
                repo_id="a/b",
                revision=None,
                task="text-generation",
                replicas=replicas,
            )
        )
        await self.up(walltime_min=walltime_min, site=site)

    async def up(self, *, walltime_min: int = 60, site: str = SITE) -> list[dict[str, Any]]:
        """An operator wants it up."""
        return await self.fleet.allocate(NAME, site=site, walltime_min=walltime_min)

    async def report(self, launcher: str = "login1", **said: Any) -> None:
        """A launcher's report, as `launcher_api` passes it on."""
        plain: dict[str, Any] = {"submitted": [], "refused": [], "cancelled": [], "jobs": None}
        await self.orders.report(SITE, launcher, **plain | said)

    async def runs(self, order: dict[str, Any], *, warm: bool = True) -> None:
        """The job of an order starts: its pilot joins, and its worker gets warm."""
        key = order["join_token"]
        await self.fleet.join(key, worker_key=f"w{key}", pilot_key=f"p{key}", node="n1")
        await self.fleet.note(order["allocation"], AllocationState.LOADING)
        if warm:
            await self.fleet.note(order["allocation"], AllocationState.WARM)

    def row(self, allocation_id: str) -> Allocation:
        """An allocation as it is stored."""
        rows = self.store.allocations(live_only=False)
        return next(each for each in rows if each.id == allocation_id)


def line(order: dict[str, Any], job_id: str, state: str = "PENDING", **facts: Any) -> JobLine:
    """A job of an order in a listing."""
    return JobLine(name=order["name"], job_id=job_id, state=state, **facts)
