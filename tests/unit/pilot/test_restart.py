"""The table by which a pilot starts its worker again, or leaves."""

from __future__ import annotations

import pytest

from edif_hpc.pilot.restart import (
    MAX_PAUSE_S,
    MAX_YOUNG_DEATHS,
    WORTH_S,
    YOUNG_S,
    Restart,
    after_exit,
)
from edif_hpc.slurm.order import WorkerExit

OLD, YOUNG = YOUNG_S, YOUNG_S - 0.1
SIGKILLED = -9


@pytest.mark.parametrize("lived_s", [YOUNG, OLD])
@pytest.mark.parametrize(
    ("code", "cause"),
    [(WorkerExit.DRAINED, "drained"), (WorkerExit.REFUSED, "refused by the relay")],
)
def test_some_exits_are_final(code: int, cause: str, lived_s: float) -> None:
    after = after_exit(Restart(), code=code, lived_s=lived_s, ending="", left_s=None)
    assert after == Restart(cause=cause)


@pytest.mark.parametrize("code", [1, SIGKILLED, *WorkerExit])
def test_when_the_allocation_ends_that_is_the_cause(code: int) -> None:
    after = after_exit(Restart(), code=code, lived_s=YOUNG, ending="its walltime ended", left_s=9)
    assert after == Restart(cause="its walltime ended")


@pytest.mark.parametrize("code", [1, SIGKILLED, WorkerExit.ENGINE_DIED])
def test_nothing_is_started_for_the_last_minutes(code: int) -> None:
    def after(left_s: float) -> Restart:
        return after_exit(Restart(), code=code, lived_s=OLD, ending="", left_s=left_s)

    assert after(WORTH_S) == Restart()
    assert after(WORTH_S - 1).cause == f"the worker died (exit code {code}) with 119 s left"


@pytest.mark.parametrize("code", [1, SIGKILLED, WorkerExit.ENGINE_DIED])
def test_one_that_lived_long_is_started_at_once(code: int) -> None:
    before = Restart(young_deaths=MAX_YOUNG_DEATHS - 1)
    assert after_exit(before, code=code, lived_s=OLD, ending="", left_s=None) == Restart()


@pytest.mark.parametrize("code", [1, SIGKILLED, WorkerExit.ENGINE_DIED])
def test_young_deaths_are_spaced_and_counted(code: int) -> None:
    restart, pauses = Restart(), []
    while restart.cause is None:
        restart = after_exit(restart, code=code, lived_s=YOUNG, ending="", left_s=None)
        pauses.append(restart.delay_s)
    assert len(pauses) == MAX_YOUNG_DEATHS
    assert pauses[:-1] == [0.0, 1.0, 2.0, 4.0]
    assert max(pauses) <= MAX_PAUSE_S
    assert f"5 times in a row (last exit code {code})" in restart.cause


def test_weak_isolation_is_no_better_the_second_time() -> None:
    after = after_exit(
        Restart(), code=WorkerExit.TOO_WEAK, lived_s=YOUNG, ending="", left_s=10 * OLD
    )
    assert after.cause == "isolation below the floor"


def test_a_model_that_does_not_load_is_given_up_however_long_it_tries() -> None:
    restart, starts = Restart(), 0
    while restart.cause is None and starts < 100:
        restart = after_exit(
            restart, code=WorkerExit.ENGINE_FAILED, lived_s=10 * OLD, ending="", left_s=None
        )
        starts += 1
    assert starts == MAX_YOUNG_DEATHS
