"""A pilot and the ticket of its successor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edif_hpc.errors import SlurmUnavailable, SubmitRefused, SubmitUnknown
from edif_hpc.pilot.ending import WALLTIME, Ending
from edif_hpc.pilot.revive import LISTINGS, Reviving
from edif_hpc.slurm.order import read_pilot_order
from edif_hpc.slurm.ordering import Ordering
from edif_hpc.slurm.site import Gpu, Site
from edif_hpc.slurm.status import JobLine
from edif_hpc.testing.clock import ManualClock
from edif_hpc.testing.submitter import FakeSubmitter
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire import messages as m

NAME = "edif-gpt2-0-4-abcdef01"
TICKET = m.Order(
    allocation="abcdef0123456789", name=NAME, join_token="secret", gpu="a6000", gpus=1, walltime_min=60,
    exclude=["bad1"], begin_after_s=5.0,
)  # fmt: skip
WAIT_S = 10.0


@dataclass
class FakeRelay:
    tickets: list[m.Order | None] = field(default_factory=list)
    deaf: int = 0  # so many reports are not heard
    told: list[m.Ordered] = field(default_factory=list)
    asked: int = 0

    async def ask(self, message: m.Revive | m.Ordered, *, within_s: float) -> m.Order | None:
        await asyncio.sleep(0)
        assert within_s > 0.0
        if isinstance(message, m.Revive):
            self.asked += 1
            return (
                self.tickets.pop(0)
                if self.tickets
                else m.Order(reason="no successor is ordered yet")
            )
        self.told.append(message)
        if self.deaf:
            self.deaf -= 1
            return None
        return m.Order(reason=m.HEARD)


@dataclass
class FakeScheduler:
    answers: list[JobLine | Exception | None] = field(default_factory=list)

    def find(self, _name: str) -> JobLine | None:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@dataclass
class Bench:
    reviving: Reviving
    relay: FakeRelay
    submitter: FakeSubmitter
    scheduler: FakeScheduler

    async def until(self, condition: Callable[[], object]) -> None:
        """Revive until something holds."""
        running = asyncio.create_task(self.reviving.run())
        await wait_until_async(condition, WAIT_S, "the pilot revives")
        running.cancel()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    gpu = Gpu(
        partition="p", gres="gpu:a6000", vendor="nvidia", max_walltime_min=120, cpus=4, mem_gb=16
    )
    site = Site(
        name="alpha",
        scheduler="slurm",
        state_dir=tmp_path / "state",
        scratch="/scratch",
        gpus={"a6000": gpu},
    )
    relay, submitter, scheduler = FakeRelay(), FakeSubmitter(lambda: "18"), FakeScheduler()
    ordering = Ordering(
        site=site,
        relay_url="https://relay",
        submitter=submitter,
        site_file=tmp_path / "alpha.toml",
    )
    reviving = Reviving(
        ordering=ordering,
        scheduler=scheduler,
        relay=relay,
        ending=Ending(ManualClock(), term_s=20.0),
        ask_s=0.01,
        apart_s=0.0,
    )
    return Bench(reviving, relay, submitter, scheduler)


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def outcome() -> str:
        if left:
            raise left.pop(0)
        return "18"

    return outcome


async def test_the_ticket_becomes_a_job(bench: Bench) -> None:
    bench.relay.tickets = [None, m.Order(reason="no successor is ordered yet"), TICKET]
    await bench.until(lambda: bench.relay.told)
    (submission,) = bench.submitter.taken
    assert (submission.name, submission.gres, submission.walltime_min) == (NAME, "gpu:a6000:1", 60)
    assert (submission.exclude, submission.begin_after_s) == (("bad1",), 5.0)
    order = read_pilot_order(submission.order)
    assert (order.join_token, order.relay_url) == ("secret", "https://relay")
    assert order.site_file.endswith("alpha.toml"), "the successor revives, too"
    assert order.folder == str(submission.folder)
    assert bench.relay.told[0] == m.Ordered(allocation=TICKET.allocation or "", job_id="18")


async def test_it_is_told_until_it_was_heard(bench: Bench) -> None:
    bench.relay.tickets, bench.relay.deaf = [TICKET], 3
    await bench.until(lambda: len(bench.relay.told) == 4)
    assert len(bench.submitter.taken) == 1


async def test_a_refusal_is_passed_on(bench: Bench) -> None:
    bench.relay.tickets = [TICKET]
    bench.submitter.outcome = failing(SubmitRefused("QOSMaxSubmitJob", kind="quota"))
    await bench.until(lambda: bench.relay.told)
    told = bench.relay.told[0]
    assert (told.job_id, told.refusal, told.detail) == (None, "quota", "QOSMaxSubmitJob")


async def test_a_submission_without_an_answer_is_looked_for(bench: Bench) -> None:
    bench.relay.tickets = [TICKET]
    bench.submitter.outcome = failing(SubmitUnknown("sbatch did not answer"))
    line = JobLine(name=NAME, job_id="21", state="pending")
    bench.scheduler.answers = [SlurmUnavailable("away"), None, line]
    await bench.until(lambda: bench.relay.told)
    assert bench.relay.told[0].job_id == "21"
    assert len(bench.submitter.taken) == 1, "it is never tried again here"


async def test_what_two_listings_miss_was_not_submitted(bench: Bench) -> None:
    bench.relay.tickets = [TICKET]
    bench.submitter.outcome = failing(SubmitUnknown("sbatch did not answer"))
    bench.scheduler.answers = [None] * LISTINGS
    await bench.until(lambda: bench.relay.told)
    assert (bench.relay.told[0].refusal, bench.scheduler.answers) == ("retry", [])


async def test_the_last_chance_ends_with_the_ticket(bench: Bench) -> None:
    bench.reviving.ask_s = 3600.0
    running = asyncio.create_task(bench.reviving.run())
    await wait_until_async(lambda: bench.relay.asked, WAIT_S, "it asks")
    bench.relay.tickets = [TICKET]
    bench.reviving.ending.come(WALLTIME, within_s=60.0)
    await bench.reviving.last_chance()
    assert bench.relay.told, "an end that has begun makes it ask at once"
    running.cancel()
