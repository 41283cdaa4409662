"""kill -9 at random moments, under load: nothing that was accepted is lost, nothing happens twice.

Several clients send without pause, half of them listening, half of them polling. Meanwhile relay, workers, pilots and
executors are killed, in an order and at moments that come from the seed. The relay is started again here; a worker by its
pilot; an executor by its engine; for a pilot, the harness plays the launcher: when nothing of the allocation lives any more it
says so to the relay and submits a new one.

Every accepted request has to end once: with its right result, bit for bit, or with an honest ERROR that says how often its
processes died. Doubled would be two terminal frames, two stored results or two charges. Re-executions are allowed, and counted.
A run in which no kill hit a leased request proves nothing, and fails.
"""

from __future__ import annotations

import functools
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import click

from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing.audit import Audit, audit
from edif_hpc.testing.load import RECOVERY_S, Load
from edif_hpc.testing.models import build_tiny_gpt2
from edif_hpc.testing.operator import Unexpected
from edif_hpc.testing.processes import Process
from edif_hpc.testing.stack import MODEL, Stack
from edif_hpc.testing.wait import wait_until
from edif_hpc.testing.work import NoopWork, capture

KINDS: Final = ("relay", "worker", "pilot", "executor")
SETTINGS: Final = {"lease_s": 6.0, "heartbeat_s": 0.5, "poll_hold_s": 0.1, "log_level": "warning"}


@dataclass(kw_only=True)
class Report:
    """What came of it."""

    seed: int
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    hits: Counter[str] = field(default_factory=Counter)  #: kills of something that held a lease
    sent_again: int = 0  #: requests whose client heard no RECEIVED
    audit: Audit = field(default_factory=Audit)
    faults: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the promise held, and was put to the test."""
        return not self.faults and self.hits.total() > 0

    def lines(self) -> list[str]:
        """For people."""
        books = self.audit
        killed = ", ".join(
            f"{count} {kind} ({self.hits[kind]} held a lease)"
            for kind, count in sorted(self.kills.items())
        )
        causes = ", ".join(f"{count} {cause}" for cause, count in books.lost_leases.most_common())
        return [
            f"seed {self.seed}: {self.kills.total()} kills in {self.seconds:.0f} s: {killed}",
            f"{books.requests} requests accepted: {books.completed} completed, {dict(books.errors) or 'no'} errors; "
            f"{self.sent_again} sent again before RECEIVED",
            f"{books.executions} executions, {books.reexecutions} of them again; leases lost: {causes or 'none'}",
            f"lost or doubled: {len(self.faults)}",
            *self.faults[:20],
            *(
                []
                if self.hits.total()
                else ["no kill hit a leased request: this run proves nothing"]
            ),
        ]


class Reaper:
    """Kills by plan, and plays the launcher."""

    def __init__(
        self,
        stack: Stack,
        report: Report,
        *,
        engine: str,
        slots: int,
        pause_s: float,
        on_kill: Callable[[Report], None],
    ) -> None:
        self._stack, self._report, self._on_kill = stack, report, on_kill
        self._engine, self._slots, self._pause_s = engine, slots, pause_s
        self._chance = random.Random(f"{report.seed} kills")  # noqa: S311 - repeatable

    def run(self, kills: Mapping[str, int]) -> None:
        """Carry out so many kills of each kind."""
        plan = [kind for kind, count in kills.items() for _ in range(count)]
        self._chance.shuffle(plan)
        for kind in plan:
            wait_until(
                self._tended_for(self._chance.uniform(0, self._pause_s)),
                RECOVERY_S,
                "the pause is over",
            )
            look = functools.partial(self._killed, kind)
            wait_until(look, RECOVERY_S, f"there is a {kind} to kill")
            self._report.kills[kind] += 1
            self._on_kill(self._report)
            if kind == "relay":
                self._stack.wait_relay()
        wait_until(self._tended_for(0), RECOVERY_S, "what was killed is tended")
        self._stack.wait_warm(timeout_s=RECOVERY_S)

    def _tended_for(self, seconds: float) -> Callable[[], bool]:
        until = time.monotonic() + seconds

        def look() -> bool:
            self._tend()
            return time.monotonic() >= until

        return look

    def _tend(self) -> None:
        """What a supervisor does for the relay, and a launcher for allocations."""
        if self._stack.relay is None:
            self._stack.start_relay()
        for each in [each for each in self._stack.allocations if each.over]:
            self._stack.bury(each)
        if len(self._stack.allocations) < self._slots:
            self._stack.launch(engine=self._engine)

    def _killed(self, kind: str) -> bool:
        """Kill someone of this kind; False if there is none, or if it ended before."""
        self._tend()
        lines = self._stack.operator.get("/ps")["processes"]
        held = {
            each["name"]: each["worker"]["leases"]
            for each in lines
            if (each["worker"] or {}).get("state") == "warm"
        }
        living = self._stack.processes()
        if kind == "relay":
            candidates = [(each, sum(held.values())) for each in living if each.kind == "relay"]
        else:
            candidates = [
                (each, leases)
                for name, leases in held.items()
                for each in living
                if each.kind == kind and name in _ancestry(each, living)
            ]
        if not candidates:
            return False
        victim, leases = self._chance.choice(candidates)
        if not victim.kill(signal.SIGKILL):
            return False
        self._report.hits[kind] += leases > 0
        return True


def _ancestry(process: Process, living: list[Process]) -> str:
    """The command lines from a process up to its pilot; they name its allocation."""
    by_pid = {each.pid: each for each in living}
    commands, at = "", by_pid.get(process.pid)
    while at is not None:
        commands += at.command
        at = by_pid.get(at.parent)
    return commands


def run(
    folder: Path,
    *,
    model: Path | None,
    kills: Mapping[str, int],
    seed: int,
    engine: str = "real",
    clients: int = 6,
    slots: int = 2,
    pause_s: float = 1.0,
    on_kill: Callable[[Report], None] = lambda _: None,
) -> Report:
    """One run; `model` is needed by the real engine. `on_kill` hears of each kill."""
    report = Report(seed=seed)
    models = {MODEL: model} if model else {}
    facts = EngineFacts(threads=1)  # two workers share the cores
    with Stack(root=folder, models=models, settings=SETTINGS, engine=facts) as stack:
        stack.deploy(replicas=slots)
        stack.launch(engine=engine)
        stack.wait_warm(count=slots)
        client = stack.client()
        work = capture(stack, client) if engine == "real" else NoopWork()
        began = time.monotonic()
        load = Load(client, work, clients=clients, seed=seed)
        load.start()
        try:
            reaper = Reaper(
                stack, report, engine=engine, slots=slots, pause_s=pause_s, on_kill=on_kill
            )
            reaper.run(kills)
        finally:
            load.finish()
        wait_until(
            lambda: stack.operator.unfinished() == 0, RECOVERY_S, "everything accepted has ended"
        )
        report.seconds = time.monotonic() - began
        status = stack.stop_relay()
        if status != 0:
            raise Unexpected(f"the relay stopped with {status}")
        report.audit = audit(stack.data_dir, told=load.right, right=load.right)
    report.sent_again = load.sent_again
    report.faults = [*load.faults, *report.audit.faults]
    return report


@click.command()
@click.option(
    "--kills",
    default="200",
    show_default=True,
    help="Kills of each kind of process, or of some kinds: relay=200,executor=200,worker=20.",
)
@click.option("--seed", type=int, help="Repeats a run's choices; a new one is drawn and printed.")
@click.option(
    "--engine",
    type=click.Choice(["real", "noop"]),
    default="real",
    show_default=True,
    help="noop has no executors.",
)
@click.option("--clients", default=6, show_default=True)
@click.option("--slots", default=2, show_default=True, help="Workers at a time.")
@click.option(
    "--pause", default=1.0, show_default=True, help="Longest pause between two kills, in seconds."
)
def main(
    kills: str, seed: int | None, engine: str, clients: int, slots: int, pause: float
) -> None:
    """Kill relay, workers, pilots and executors at random under load."""
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    click.echo(f"seed {seed}")
    plan = _plan(kills, KINDS if engine == "real" else KINDS[:-1])
    began = time.monotonic()

    def tell(report: Report) -> None:
        done, whole = report.kills.total(), sum(plan.values())
        if done % max(1, whole // 20) == 0:
            click.echo(
                f"  {done} of {whole} kills after {time.monotonic() - began:.0f} s", err=True
            )

    with tempfile.TemporaryDirectory(prefix="edif-chaos-") as folder:
        model = build_tiny_gpt2(Path(folder) / "model") if engine == "real" else None
        report = run(
            Path(folder) / "stack",
            model=model,
            kills=plan,
            seed=seed,
            engine=engine,
            clients=clients,
            slots=slots,
            pause_s=pause,
            on_kill=tell,
        )
    click.echo("\n".join(report.lines()))
    sys.exit(not report.ok)


def _plan(text: str, kinds: tuple[str, ...]) -> dict[str, int]:
    """How many kills of which kind."""
    if text.isdigit():
        return dict.fromkeys(kinds, int(text))
    plan = {}
    for part in text.split(","):
        kind, _, count = part.partition("=")
        if kind not in kinds or not count.isdigit():
            raise click.BadParameter(
                f"{part!r} is not KIND=COUNT with a KIND of {', '.join(kinds)}"
            )
        plan[kind] = int(count)
    return plan


if __name__ == "__main__":
    main()
