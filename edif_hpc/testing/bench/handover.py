"""Walltimes that end under load, on a real Slurm: no request fails, and nobody notices.

Relay, launcher and Slurm are real, and so are pilots and workers in their jobs; only the workers' engine runs no model. Each slot
hands over as often as told, at walltimes of a minute or two, while clients send requests of 0.05 to 30 seconds, so that some run
and some upload their result at the moment their worker is told to leave. Where nothing ran at one hand-over in ten, or no upload
crossed any, the run proves nothing, and fails.

Told at the end, from the relay's books: each generation's moments, the gaps in which a slot was empty, the time in which two
allocations of a slot overlapped (what a hand-over costs), and what requests took beyond their own run, around hand-overs and
in between.

Needs root, to run Slurm.
"""

from __future__ import annotations

import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Final

import click

from edif_hpc.testing.audit import Audit, audit
from edif_hpc.testing.generations import Books, Cost, Generation, HandOver, cost, read
from edif_hpc.testing.load import RECOVERY_S, Load, Took
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.operator import Unexpected
from edif_hpc.testing.slurm import SlurmCluster, serve_slurm
from edif_hpc.testing.slurm_stack import SlurmStack
from edif_hpc.testing.wait import wait_until
from edif_hpc.testing.work import Piece

EXECUTORS: Final = 8
SHORTEST_S: Final = 0.05
LARGE_BYTES: Final = 9 << 20  # more than one part, so that the first goes up while it runs
_LARGE_SHARE: Final = 0.05
#: Slurm, and the machine, take their time: so long a hand-over may take beyond its walltime.
_PATIENCE_S: Final = 180.0
_AROUND_S: Final = 5.0
_IDLE_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class SpreadWork:
    """Requests of all lengths alike (log-uniform); a few are long and have a large result that goes up while they run."""

    longest_s: float

    def piece(self, chance: random.Random) -> Piece:
        """The next one."""
        large = chance.random() < _LARGE_SHARE
        shortest = self.longest_s / 4 if large else SHORTEST_S
        seconds = math.exp(chance.uniform(math.log(shortest), math.log(self.longest_s)))
        blob = Task(
            name=f"{chance.getrandbits(64):016x}",
            seconds=seconds,
            grows=large,
            result_bytes=LARGE_BYTES if large else 64,
        ).blob()
        return Piece(
            blob=blob,
            right=lambda data: data == result_of(blob),
            compress=False,
            runs_s=seconds,
        )


@dataclass(kw_only=True)
class Report:
    """What came of it."""

    seed: int
    slots: int
    walltime_min: int
    seconds: float = 0.0
    generations: list[Generation] = field(default_factory=list)
    hand_overs: list[HandOver] = field(default_factory=list)
    cost: Cost | None = None
    took: list[Took] = field(default_factory=list)
    audit: Audit = field(default_factory=Audit)
    faults: list[str] = field(default_factory=list)
    began: float = 0.0  #: wall clock
    stopped: float = 0.0  #: when nothing was sent any more

    @property
    def settled_at(self) -> float:
        """When the last slot had its first warm worker; until then there are more requests than workers. Wall clock."""
        first = {e.slot: e.warm for e in reversed(self.generations) if e.warm is not None}
        return max(first.values(), default=0.0)

    @property
    def rate(self) -> float:
        """Requests answered in a second, from then on until the last was sent."""
        ended = sum(self.settled_at <= each.ended_at < self.stopped for each in self.took)
        return ended / max(1.0, self.stopped - self.settled_at)

    @property
    def idle(self) -> int:
        """Hand-overs at which nothing ran."""
        return sum(not each.running for each in self.hand_overs)

    @property
    def uploads(self) -> int:
        """Uploads that crossed a hand-over."""
        return sum(each.uploads for each in self.hand_overs)

    @property
    def ok(self) -> bool:
        """Whether the promise held, and was put to the test."""
        tested = self.idle <= _IDLE_SHARE * len(self.hand_overs) and self.uploads > 0
        return tested and not (self.faults or self.audit.errors)

    def lines(self) -> list[str]:
        """For people."""
        books, spent = self.audit, self.cost
        running = [each.running for each in self.hand_overs] or [0]
        lines = [each.line(self.began) for each in self.generations]
        lines += [
            f"seed {self.seed}: {self.slots} slots, walltime {self.walltime_min} min, {len(self.hand_overs)} hand-overs "
            f"in {self.seconds:.0f} s",
            f"{books.requests} requests, {self.rate:.1f} /s: {books.completed} completed, "
            f"{dict(books.errors) or 'no'} errors; {books.reexecutions} executions again; "
            f"leases lost: {dict(books.lost_leases) or 'none'}",
            f"running at a hand-over: {min(running)} to {max(running)}; uploads that crossed one: {self.uploads}",
            *self._delays(),
        ]
        if spent is not None:
            lines.append(
                f"gaps: {spent.gaps}, {spent.gap_s:.1f} s; overlap: {spent.overlap_s:.0f} of {spent.allocated_s:.0f} "
                f"GPU-seconds ({spent.overlap_share:.0%})"
            )
        lines += [f"failed or doubled: {len(self.faults)}", *self.faults[:20]]
        if self.idle:
            lines.append(f"nothing ran at {self.idle} hand-over(s), which prove nothing")
        if not self.uploads:
            lines.append("no upload crossed a hand-over: this run proves nothing of them")
        return lines

    def _delays(self) -> list[str]:
        around: list[float] = []
        steady: list[float] = []
        settled = [each for each in self.took if each.sent_at >= self.settled_at]
        for each in settled:
            near = any(
                each.sent_at - _AROUND_S <= change.at <= each.ended_at
                for change in self.hand_overs
            )
            (around if near else steady).append(each.delay_s)
        return [
            f"beyond its own run a request took {_figures(around)} around hand-overs, {_figures(steady)} in between"
        ]


def run(
    folder: Path,
    cluster: SlurmCluster,
    *,
    seed: int,
    slots: int = 5,
    hand_overs: int = 4,
    walltime_min: int = 2,
    longest_s: float = 30.0,
    clients: int = 30,
    pilots_submit: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """One run; each slot hands over so many times."""
    report = Report(seed=seed, slots=slots, walltime_min=walltime_min)
    with SlurmStack(root=folder, cluster=cluster, pilots_submit=pilots_submit) as site:
        stack = site.stack
        stack.deploy(executors=EXECUTORS)
        site.start_launcher()
        report.began = time.time()
        site.up(slots=slots, walltime_min=walltime_min)
        site.wait_warm()
        load = Load(stack.client(), SpreadWork(longest_s=longest_s), clients=clients, seed=seed)
        began = time.monotonic()
        load.start()
        try:
            _until_handed_over(site, slots, hand_overs, walltime_min, tell)
            report.stopped = time.time()
        finally:
            load.finish()
        wait_until(lambda: stack.operator.unfinished() == 0, RECOVERY_S, "everything has ended")
        report.seconds = time.monotonic() - began
        stack.operator.post("/drain", {})
        wait_until(lambda: not site.jobs(), RECOVERY_S, "all jobs have ended")
        status = stack.stop_relay()
        if status != 0:
            raise Unexpected(f"the relay stopped with {status}")
        books = read(stack.data_dir)
        report.audit = audit(stack.data_dir, told=load.right, right=load.right)
    _fill(report, books, load)
    return report


def _fill(report: Report, books: Books, load: Load) -> None:
    report.generations = books.generations
    report.hand_overs = [each for each in books.hand_overs if each.at < report.stopped]
    report.cost = cost(books.generations)
    report.took = load.took
    report.faults = [*load.faults, *report.audit.faults, *_second_jobs(books.generations)]


def _second_jobs(generations: Sequence[Generation]) -> list[str]:
    places = [(each.slot, each.number) for each in generations]
    return [f"{place} was submitted twice" for place in set(places) if places.count(place) > 1]


def _until_handed_over(
    site: SlurmStack, slots: int, hand_overs: int, walltime_min: int, tell: Callable[[str], None]
) -> None:
    told = [""]

    def done() -> bool:
        warm = [
            sum(each["warm_at"] is not None for each in site.generations(slot))
            for slot in range(slots)
        ]
        now = f"warm generations of each slot: {' '.join(map(str, warm))}"
        if now != told[0]:
            tell(now)
            told[0] = now
        return min(warm) > hand_overs

    limit_s = (hand_overs + 1) * 60.0 * walltime_min + _PATIENCE_S
    wait_until(_seldom(done), limit_s, f"each slot has handed over {hand_overs} times")


def _seldom(look: Callable[[], bool], every_s: float = 1.0) -> Callable[[], bool]:
    """Look once a second: what is looked for takes minutes, and the machine has work to do."""
    next_at = [0.0]

    def now_and_then() -> bool:
        if time.monotonic() < next_at[0]:
            return False
        next_at[0] = time.monotonic() + every_s
        return look()

    return now_and_then


def _figures(delays: Sequence[float]) -> str:
    if len(delays) < 2:
        return f"(only {len(delays)})"
    cuts = quantiles(delays, n=100)
    return f"p50 {cuts[49]:.2f}, p99 {cuts[98]:.2f} s ({len(delays)})"


@click.command()
@click.option("--slots", default=5, show_default=True)
@click.option("--generations", default=4, show_default=True, help="Hand-overs of each slot.")
@click.option("--walltime", default=2, show_default=True, help="In minutes, as Slurm counts.")
@click.option(
    "--longest", default=30.0, show_default=True, help="The longest request, in seconds."
)
@click.option("--clients", default=30, show_default=True)
@click.option("--pilots-submit", is_flag=True, help="Pilots submit their successors themselves.")
@click.option("--seed", type=int, help="Repeats the requests; a new one is drawn and printed.")
def main(
    *,
    slots: int,
    generations: int,
    walltime: int,
    longest: float,
    clients: int,
    pilots_submit: bool,
    seed: int | None,
) -> None:
    """Let walltimes end under load on a real Slurm."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="edif-handover-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # jobs run as another user
        with serve_slurm(folder / "slurm", gpus=max(2, slots)) as cluster:
            report = run(
                folder / "stack",
                cluster,
                seed=seed,
                slots=slots,
                hand_overs=generations,
                walltime_min=walltime,
                longest_s=longest,
                clients=clients,
                pilots_submit=pilots_submit,
                tell=lambda text: click.echo(f"  {text}", err=True),
            )
    click.echo("\n".join(report.lines()))
    sys.exit(not report.ok)


if __name__ == "__main__":
    main()
