"""By when an allocation has to be empty: signals and the timer, whichever comes first, and what each allows."""

from __future__ import annotations

import asyncio
import signal

import pytest

from edif_hpc.errors import SlurmUnavailable
from edif_hpc.pilot.ending import (
    CUT_SHORT,
    DRAIN_S,
    REFUSED,
    SIGNALLED,
    WALLTIME,
    WARNED_S,
    Ending,
)
from edif_hpc.pilot.lifetime import Lifetime
from edif_hpc.pilot.runtime import Pilot
from edif_hpc.slurm.order import PilotOrder
from edif_hpc.testing.clock import ManualClock
from edif_hpc.testing.wait import wait_until_async

TERM_S = 20.0
JOB = {"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "1"}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def ending(clock: ManualClock) -> Ending:
    return Ending(clock, term_s=TERM_S)


def lifetime(
    clock: ManualClock, ending: Ending, *answers: float | None, end_s: float = 0.0
) -> Lifetime:
    """Of a job whose environment tells the end, or whose controller answers so, and then falls silent."""
    said = list(answers)

    def ask() -> float | None:
        if not said:
            raise SlurmUnavailable("Socket timed out")
        return said.pop(0)

    told = {"SLURM_JOB_END_TIME": str(int(clock.wall() + end_s))} if end_s else {}
    return Lifetime(JOB | told, clock=clock, ending=ending, ask=ask if answers else None)


@pytest.mark.parametrize(
    ("number", "left_s", "cause", "takes_s"),
    [
        (signal.SIGUSR2, None, WALLTIME, WARNED_S),
        (signal.SIGUSR1, 3600.0, SIGNALLED, TERM_S),
        (signal.SIGTERM, 3600.0, SIGNALLED, TERM_S),
        (signal.SIGINT, None, SIGNALLED, TERM_S),
    ],
)
def test_what_a_signal_allows(
    ending: Ending, number: signal.Signals, left_s: float | None, cause: str, takes_s: float
) -> None:
    assert not ending.begun
    assert ending.left_s is None
    ending.signalled(number, left_s)
    assert ending.begun
    assert (ending.cause, ending.left_s) == (cause, takes_s)


def test_a_warning_of_an_end_that_is_known_says_nothing_new(ending: Ending) -> None:
    """It may come before the successor is due; the timer does not."""
    ending.signalled(signal.SIGUSR2, 178.0)
    assert not ending.begun


def test_the_end_comes_nearer_and_never_goes_away(clock: ManualClock, ending: Ending) -> None:
    ending.signalled(signal.SIGUSR2, None)
    ending.signalled(signal.SIGTERM, None)
    assert (ending.cause, ending.left_s) == (SIGNALLED, TERM_S)
    ending.signalled(signal.SIGUSR2, None)
    assert (ending.cause, ending.left_s) == (SIGNALLED, TERM_S)
    clock.advance(TERM_S + 1)
    assert ending.left_s == 0.0


def test_each_cause_has_a_signal_for_what_still_runs() -> None:
    assert set(CUT_SHORT) == {WALLTIME, SIGNALLED, REFUSED}


async def test_waiting_ends_when_the_end_comes_nearer(clock: ManualClock, ending: Ending) -> None:
    ending.come(WALLTIME, within_s=3600.0)
    over = asyncio.create_task(ending.until_over())
    await asyncio.sleep(0)
    assert not over.done()
    ending.come(SIGNALLED, within_s=0.0)
    await asyncio.wait_for(over, timeout=10.0)


def test_the_environment_tells_the_end(clock: ManualClock, ending: Ending) -> None:
    job = lifetime(clock, ending, end_s=3600.0)
    assert job.left_s == pytest.approx(3600.0, abs=1.0)
    assert (job.id, job.restarts) == ("17", 1)
    clock.advance(600.0)
    assert job.left_s == pytest.approx(3000.0, abs=1.0)


def test_a_job_without_an_end_has_none(clock: ManualClock, ending: Ending) -> None:
    job = Lifetime({}, clock=clock, ending=ending, ask=None)
    assert (job.left_s, job.id, job.restarts) == (None, None, 0)


def test_what_is_told_is_no_more_than_the_drain_may_take(
    clock: ManualClock, ending: Ending
) -> None:
    """So that the relay orders a successor for one that is preempted."""
    job = lifetime(clock, ending, end_s=3600.0)
    ending.signalled(signal.SIGTERM, None)
    assert job.left_s == TERM_S


async def test_the_controller_is_asked_where_the_environment_is_silent(
    clock: ManualClock, ending: Ending
) -> None:
    job = lifetime(clock, ending, 0.0)
    assert job.left_s is None
    await asyncio.wait_for(job.watch(), timeout=10.0)
    assert (ending.cause, job.left_s) == (WALLTIME, 0.0)


async def test_an_end_that_was_moved_is_noticed(clock: ManualClock, ending: Ending) -> None:
    """The environment says that it is near; the controller knows better, and then no more."""
    job = lifetime(clock, ending, 7200.0, end_s=1.0)
    watching = asyncio.create_task(job.watch())
    await wait_until_async(lambda: (job.left_s or 0.0) > 7000.0, 10.0, "the controller is asked")
    assert not ending.begun
    watching.cancel()


async def test_a_silent_controller_changes_nothing(clock: ManualClock, ending: Ending) -> None:
    job = lifetime(clock, ending, 60.0)
    watching = asyncio.create_task(job.watch())
    await wait_until_async(lambda: job.left_s, 10.0, "the controller is asked")
    assert not ending.begun, "a short walltime is not all drain"
    assert job.left_s == 60.0 < DRAIN_S
    watching.cancel()


async def test_a_warning_that_comes_early_only_asks_again(
    clock: ManualClock, ending: Ending
) -> None:
    """Slurm's may come minutes early, and the successor is ordered for the end itself."""
    job = lifetime(clock, ending, 3600.0, 1800.0, 0.0)
    watching = asyncio.create_task(job.watch())
    await wait_until_async(lambda: job.left_s is not None, 10.0, "the controller was asked")
    job.warned()
    await wait_until_async(lambda: job.left_s == 1800.0, 10.0, "it looked again")
    assert not ending.begun
    job.warned()
    await asyncio.wait_for(watching, timeout=10.0)
    assert ending.cause == WALLTIME


@pytest.mark.parametrize(
    ("left_s", "cause"), [(150.0, ""), (3000.0, SIGNALLED), (None, SIGNALLED)]
)
async def test_a_warning_far_from_the_end_asks_whether_the_end_was_moved(
    clock: ManualClock, ending: Ending, left_s: float | None, cause: str
) -> None:
    """What an administrator made shorter is no preemption, and has time left; a silent controller proves nothing."""
    order = PilotOrder(name="n", relay_url="http://127.0.0.1:9", join_token="t", scratch="/s")
    pilot = Pilot(order=order, clock=clock)
    asked: list[bool] = []

    def ask() -> float | None:
        asked.append(True)
        if left_s is None:
            raise SlurmUnavailable("Socket timed out")
        return left_s

    told = {"SLURM_JOB_END_TIME": str(int(clock.wall() + 3600))}
    pilot.ending = ending
    pilot.lifetime = Lifetime(JOB | told, clock=clock, ending=ending, ask=ask)
    pilot.signalled(signal.SIGUSR2)
    assert not ending.begun
    await wait_until_async(lambda: asked, 10.0, "it asks")
    await wait_until_async(lambda: not pilot.lifetime.may_have_moved, 10.0, "it knows")
    assert ending.cause == cause
