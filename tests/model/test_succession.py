"""Slots over a scheduler, launchers and pilots that fail in every way, with the real rules, orders and slots of the relay.

A Hypothesis machine plays the cluster: a scheduler that starts jobs late, ends them, hides, lies once in a while with an empty
listing; two launchers and pilots with a ticket that die between asking, submitting and reporting; pilots that die, fall silent
or never get warm. The relay's own parts (`Fleet`, `Orders`, `Slots`, `Governing`) run unchanged over the store in memory, with a
clock that the machine moves; the relay itself is started anew now and then.

Always: no slot has more than one successor, no allocation has two jobs that could join, no job is submitted against the governor,
no allocation is called gone while its job lives. In the end the faults stop: then every slot must get warm, and stay so over
several walltimes.

`MODEL_EXAMPLES=2000 pytest tests/model/test_succession.py` looks deeper.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from edif_hpc.domain.allocation import PENDING, Allocation, AllocationState
from edif_hpc.domain.dispatch import END_MARGIN_S
from edif_hpc.domain.governor import PAUSE_AFTER, WINDOW_S
from edif_hpc.errors import EdifError
from edif_hpc.relay.jobs import JobLine
from edif_hpc.relay.orders import GONE
from edif_hpc.testing.slots import NAME, SITE, SlotRelay

T = TypeVar("T")

REPLICAS, WALLTIME_MIN = 3, 40
SUBMITS = 3  #: in ten minutes; few, so that it bites
STEP_S, WARMUP_S = 15.0, 45.0
LAUNCHERS = st.sampled_from(["login1", "login2"])
DEATHS = st.sampled_from(["no", "no", "after fetch", "after sbatch"])
LISTINGS = st.sampled_from(["true", "true", "unknown", "empty"])
REFUSALS = st.sampled_from([False, False, False, True])
FEW = st.integers(0, 3)
ROUNDS_TO_RECOVER = 600


@dataclass
class Job:
    """A job as the scheduler has it, with its pilot once it runs."""

    id: str
    order: dict[str, Any]
    state: str = "PENDING"
    left_s: float = 0.0
    age_s: float = 0.0
    joined: bool = False
    cut: bool = False  #: its pilot cannot be heard
    dud: bool = False  #: its model never gets warm
    ticket: dict[str, Any] | None = None

    @property
    def alive(self) -> bool:
        return self.state in {"PENDING", "RUNNING"}


class SuccessionMachine(RuleBasedStateMachine):
    """The cluster around a relay."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.relay = SlotRelay(submits=SUBMITS)
        self.clock = self.relay.clock
        self.ids = itertools.count(1)
        self.jobs: dict[str, Job] = {}
        self.submissions: list[float] = []
        self.lied: set[str] = set()
        self.up_at = 0.0
        self.run(self._begin())
        self.step()

    def teardown(self) -> None:
        try:
            self.recover()
        finally:
            self.loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    async def _begin(self) -> None:
        self.relay.start()
        await self.relay.deploy(replicas=REPLICAS, walltime_min=WALLTIME_MIN)
        self.up_at = self.clock.wall()

    async def _up(self) -> None:
        await self.relay.up(walltime_min=WALLTIME_MIN)
        self.up_at = self.clock.wall()

    # -- what happens ----------------------------------------------------------------------------

    @rule()
    def restart(self) -> None:
        """The relay is killed and started anew."""

        async def again() -> None:
            self.relay.start()

        self.run(again())

    @rule(steps=st.integers(1, 60))
    def wait(self, steps: int) -> None:
        """Time passes."""
        for _ in range(steps):
            self.step()

    @rule(
        rounds=st.lists(
            st.tuples(LAUNCHERS, DEATHS, LISTINGS, REFUSALS, st.integers(0, 6)), max_size=6
        )
    )
    def launch(self, rounds: list[tuple[str, str, str, bool, int]]) -> None:
        """Rounds of launchers, with some time between them."""
        for launcher, dies, listing, refused, steps in rounds:
            for _ in range(steps):
                self.step()
            self.run(self._launch(launcher, dies, listing, refused=refused))

    @rule(count=FEW)
    def start(self, count: int) -> None:
        """The scheduler starts a few jobs."""
        pending = [each for each in self.jobs.values() if each.state == "PENDING"]
        for job in pending[:count]:
            self.run(self._start(job))

    @rule(pick=st.integers(0, 9), how=st.sampled_from(["kill", "cut", "heal", "dud"]))
    def fault(self, pick: int, how: str) -> None:
        """Something goes wrong with a running job, or is mended."""
        running = [each for each in self.jobs.values() if each.state == "RUNNING"]
        if not running:
            return
        job = running[pick % len(running)]
        match how:
            case "kill":
                job.state = "FAILED"
            case "cut":
                job.cut = True
            case "heal":
                job.cut = False
            case _:
                job.dud = True

    @rule(pick=st.integers(0, 9))
    def scancel(self, pick: int) -> None:
        """A person cancels a job."""
        alive = [each for each in self.jobs.values() if each.alive]
        if alive:
            alive[pick % len(alive)].state = "CANCELLED"

    @rule(pick=st.integers(0, 9), dies=DEATHS)
    def revive(self, pick: int, dies: str) -> None:
        """A pilot asks for the ticket of its successor."""
        running = [each for each in self.jobs.values() if each.joined and not each.cut]
        if running:
            self.run(self._revive(running[pick % len(running)], dies))

    @rule(what=st.sampled_from(["up", "down", "drain one"]), pick=st.integers(0, 9))
    def operate(self, what: str, pick: int) -> None:
        """An operator does something."""

        async def act() -> None:
            live = sorted(self.relay.fleet.live(), key=lambda each: each.name)
            if what == "up":
                await self._up()
            elif what == "down":
                await self.relay.fleet.drain(NAME, None)
            elif live:
                await self.relay.fleet.drain(None, live[pick % len(live)].id)

        self.run(act())

    # -- the cluster -----------------------------------------------------------------------------

    def step(self) -> None:
        """A few seconds for everybody."""
        self.clock.advance(STEP_S)
        self.run(self._step())

    async def _step(self) -> None:
        for job in list(self.jobs.values()):
            if job.state == "RUNNING":
                job.age_s += STEP_S
                job.left_s -= STEP_S
                if job.left_s <= 0:
                    job.state = "TIMEOUT"
                elif job.joined and not job.cut:
                    await self._pilot(job)
        now = self.clock.monotonic()
        for lost in self.relay.fleet.lost(now):
            await self.relay.fleet.end(lost, cause="lost")
        await self.relay.slots.reconcile()

    async def _pilot(self, job: Job) -> None:
        fleet, row = self.relay.fleet, self.row(job)
        if row is None:
            job.state = "COMPLETED"  # its key is refused: it leaves
            return
        fleet.pilot_spoke(row.id, self.clock.monotonic(), job.left_s)
        if row.state is AllocationState.DRAINING:
            job.state = "COMPLETED"
            await fleet.end(row.id, cause="drained")
        elif row.state is AllocationState.STARTED:
            await fleet.note(row.id, AllocationState.LOADING)
        elif job.dud and row.state is AllocationState.LOADING:
            job.state = "FAILED"
            await fleet.end(row.id, cause="the worker died young 5 times in a row")
        elif job.age_s >= WARMUP_S:
            await fleet.note(row.id, AllocationState.WARM)

    async def _start(self, job: Job) -> None:
        job.state, job.left_s = "RUNNING", 60.0 * job.order["walltime_min"]
        try:
            await self.relay.fleet.join(
                job.order["join_token"], worker_key=f"w{job.id}", pilot_key=f"p{job.id}", node="n"
            )
            job.joined = True
        except EdifError:
            job.state = "FAILED"

    async def _launch(self, launcher: str, dies: str, listing: str, *, refused: bool) -> None:
        jobs = self.listing(launcher, listing)
        await self.report(launcher, jobs=jobs)
        orders = await self.relay.orders.fetch(SITE, launcher, 4)
        if dies == "after fetch":
            return
        cancelled = [each["allocation"] for each in orders if self.cancel(each)]
        submits = [each for each in orders if each["kind"] == "submit"]
        if refused:
            told = [(each["allocation"], "quota", "QOSMaxSubmit") for each in submits]
            await self.report(launcher, refused=told, cancelled=cancelled)
            return
        done = [(each["allocation"], self.sbatch(each)) for each in submits]
        if dies != "after sbatch":
            await self.report(launcher, submitted=done, cancelled=cancelled)

    async def report(self, launcher: str, **said: Any) -> None:
        """As `launcher_api` passes it on; what it ended is checked."""
        before = {each.id for each in self.relay.fleet.live()}
        await self.relay.report(launcher, **said)
        for row in self.relay.fleet.past:
            if row.id in before and row.cause == GONE:
                alive = [each for each in self.joinable(row.id) if each.alive]
                assert not alive, f"{row.name} was called gone, and {alive} lives"

    def listing(self, launcher: str, kind: str) -> list[JobLine] | None:
        """What squeue shows: the truth, nothing because it failed, or nothing although it says it is all."""
        if kind == "unknown":
            return None
        if kind == "empty" and launcher not in self.lied:
            self.lied.add(launcher)
            return []
        self.lied.discard(launcher)
        return [
            JobLine(name=each.order["name"], job_id=each.id, state=each.state, left_s=each.left_s)
            for each in self.jobs.values()
            if each.alive
        ]

    def sbatch(self, order: dict[str, Any]) -> str:
        twins = [e.id for e in self.jobs.values() if e.alive and e.order["name"] == order["name"]]
        assert not twins, f"{order['name']} is submitted again although {twins} lives"
        self.submissions.append(self.clock.monotonic())
        job = Job(id=str(next(self.ids)), order=order)
        self.jobs[job.id] = job
        self.check_governor()
        return job.id

    def cancel(self, order: dict[str, Any]) -> bool:
        if order["kind"] != "cancel":
            return False
        job = self.jobs[order["job_id"]]
        if job.alive:
            job.state = "CANCELLED"
        return True

    async def _revive(self, job: Job, dies: str) -> None:
        row = self.row(job)
        if row is None:
            return
        orders = self.relay.orders
        order = await orders.revive(row.id, may_submit=True)
        if isinstance(order, str) or dies == "after fetch":
            return
        if job.ticket is not None and job.ticket["allocation"] == order["allocation"]:
            return  # it has submitted that one; it knows
        job.ticket = order
        job_id = self.sbatch(order)
        if dies == "after sbatch":
            job.state = "FAILED"
        else:
            await orders.submitted(order["allocation"], row.id, job_id)

    # -- what must be true -----------------------------------------------------------------------

    def row(self, job: Job) -> Allocation | None:
        return self.relay.fleet.allocation(job.order["allocation"])

    def joinable(self, allocation_id: str) -> list[Job]:
        """Jobs that have joined, or could: the newest token alone opens."""
        mine = [e for e in self.jobs.values() if e.order["allocation"] == allocation_id]
        tokens = [each.order["join_token"] for each in mine]
        return [e for e in mine if e.joined or e.order["join_token"] == tokens[-1]]

    def check_governor(self) -> None:
        now = self.clock.monotonic()
        lately = [at for at in self.submissions if now - at < WINDOW_S]
        assert len(lately) <= SUBMITS, f"{len(lately)} submissions within {WINDOW_S} s"
        ended = [e for e in self.relay.fleet.past if (e.ended_at or 0.0) >= self.up_at]
        warm_at = [e.warm_at or 0.0 for e in self.relay.fleet.history()]
        last_warm = max(warm_at, default=0.0)
        deaths = [
            each
            for each in ended
            if each.warm_at is None
            and each.cause not in {"drained", "cancelled"}
            and (each.ended_at or 0.0) > last_warm
        ]
        assert len(deaths) < PAUSE_AFTER, "submitted although it is paused"

    @invariant()
    def one_successor_a_slot(self) -> None:
        slots: dict[int, list[Allocation]] = {}
        for row in self.relay.fleet.live():
            if row.state is not AllocationState.DRAINING:
                slots.setdefault(row.slot, []).append(row)
        for rows in slots.values():
            assert len(rows) <= 2, f"too many: {[(e.name, e.state) for e in rows]}"
            pending = [each.name for each in rows if each.state in PENDING]
            assert len(pending) <= 1, f"two successors: {pending}"

    @invariant()
    def one_job_an_allocation(self) -> None:
        for row in self.relay.fleet.live():
            joined = [each.id for each in self.joinable(row.id) if each.alive and each.joined]
            assert len(joined) <= 1, f"{row.name} has the jobs {joined}"

    @invariant()
    def the_image_is_the_rows(self) -> None:
        rows = {each.id: each.state for each in self.relay.store.allocations()}
        assert rows == {each.id: each.state for each in self.relay.fleet.live()}

    # -- the end ---------------------------------------------------------------------------------

    def warm(self) -> set[int]:
        serving = [e for e in self.jobs.values() if e.state == "RUNNING" and e.joined]
        rows = [row for each in serving if (row := self.row(each)) is not None]
        return {row.slot for row in rows if row.state is AllocationState.WARM}

    def calm_round(self) -> None:
        self.step()
        self.run(self._launch("login1", "no", "true", refused=False))
        for job in list(self.jobs.values()):
            if job.state == "PENDING" and self.row(job) is not None:
                self.run(self._start(job))

    def recover(self) -> None:
        """No more faults, and an operator who wants it up: it gets up, and stays up over several walltimes."""
        for job in self.jobs.values():
            job.cut = job.dud = False
        self.run(self._up())
        everything = set(range(REPLICAS))
        for _ in range(ROUNDS_TO_RECOVER):
            self.calm_round()
            self.one_successor_a_slot()
            if self.warm() == everything:
                break
            if any("paused" in each.why for each in self.relay.fleet.decisions.values()):
                self.run(self._up())  # deaths of before came to light: the operator says it again
        assert self.warm() == everything, [
            (name, each.why) for name, each in self.relay.fleet.decisions.items()
        ]
        settle = round(60 * WALLTIME_MIN / STEP_S)
        for _ in range(settle):  # three may be due at once, and three may be submitted
            self.calm_round()
        rounds = round(2 * 60 * WALLTIME_MIN / STEP_S)
        dark = 0
        for _ in range(rounds):
            self.calm_round()
            self.one_successor_a_slot()
            dark += self.warm() != everything
        assert not dark, f"a slot was not served in {dark} of {rounds} rounds"


TestSuccession = SuccessionMachine.TestCase
TestSuccession.settings = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "25")),
    stateful_step_count=30,
    deadline=None,
)


def test_the_margin_is_longer_than_the_longest_beat() -> None:
    assert END_MARGIN_S > 2 * STEP_S, "or the machine would see drains come late"
