"""What a lost lease costs, and a clock that blames nobody for its own silence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.lease import (
    CRASH_BUDGET,
    QUARANTINE_WORKERS,
    LeaseClock,
    LeaseEnd,
    spends_budget,
    verdict,
)
from edif_hpc.domain.request import FailureKind

SPENDING = {LeaseEnd.EXECUTOR_CRASH, LeaseEnd.OOM, LeaseEnd.WORKER_LOST, LeaseEnd.UNKNOWN}


@pytest.mark.parametrize("end", LeaseEnd)
def test_only_crashes_and_unknown_causes_spend_the_budget(end: LeaseEnd) -> None:
    assert spends_budget(end) is (end in SPENDING)


@pytest.mark.parametrize(
    ("crashes", "end", "workers", "kind", "words"),
    [
        (0, LeaseEnd.EXPIRED, 0, None, ""),
        (CRASH_BUDGET - 1, LeaseEnd.EXECUTOR_CRASH, 0, None, ""),
        (CRASH_BUDGET - 1, LeaseEnd.WORKER_LOST, QUARANTINE_WORKERS - 1, None, ""),
        (CRASH_BUDGET, LeaseEnd.EXECUTOR_CRASH, 0, FailureKind.CRASH, "died 3 times"),
        (CRASH_BUDGET, LeaseEnd.UNKNOWN, 1, FailureKind.CRASH, "last time: unknown"),
        (CRASH_BUDGET, LeaseEnd.OOM, 0, FailureKind.OOM, "last time: oom"),
        (2, LeaseEnd.WORKER_LOST, QUARANTINE_WORKERS, FailureKind.CRASH, "quarantined: 2 workers"),
        (CRASH_BUDGET, LeaseEnd.WORKER_LOST, 2, FailureKind.CRASH, "quarantined"),
    ],
)
def test_the_verdict(
    crashes: int, end: LeaseEnd, workers: int, kind: FailureKind | None, words: str
) -> None:
    failure = verdict(crashes=crashes, end=end, workers_killed=workers, evidence={"node": "n1"})
    if kind is None:
        assert failure is None
        return
    assert failure is not None
    assert failure.kind is kind
    assert words in failure.message
    assert failure.details == {"attempts_lost": crashes, "ended_by": str(end), "node": "n1"}


def test_the_verdict_quotes_the_evidence() -> None:
    evidence = {"cause": "killed by signal 11"}
    failure = verdict(
        crashes=CRASH_BUDGET, end=LeaseEnd.EXECUTOR_CRASH, workers_killed=0, evidence=evidence
    )
    assert failure is not None
    assert "killed by signal 11" in failure.message
    assert failure.details["cause"] == "killed by signal 11"


def test_a_lease_expires_unless_it_is_renewed() -> None:
    clock = LeaseClock(lease_s=30.0)
    clock.open("kept", 100.0)
    clock.open("lost", 100.0)
    clock.sweep(100.0, period_s=10.0)
    clock.sweep(110.0, period_s=10.0)
    clock.open("kept", 119.0)
    assert clock.sweep(120.0, period_s=10.0) == []
    assert clock.sweep(129.9, period_s=10.0) == []
    assert clock.sweep(130.0, period_s=10.0) == ["lost"]
    assert clock.sweep(131.0, period_s=10.0) == ["lost"]  # until it is closed
    clock.close("lost")
    clock.close("lost")
    assert clock.sweep(140.0, period_s=10.0) == []
    assert len(clock) == 1
    assert clock.sweep(149.0, period_s=10.0) == ["kept"]


def test_after_a_start_open_leases_have_a_grace() -> None:
    clock = LeaseClock(lease_s=30.0)
    clock.open("r1", 0.0, grace=2.0)
    for now in range(0, 60, 5):
        assert clock.sweep(float(now), period_s=5.0) == []
    assert clock.sweep(60.0, period_s=5.0) == ["r1"]


def test_a_relay_that_was_stopped_loses_no_lease() -> None:
    clock = LeaseClock(lease_s=30.0)
    clock.open("r1", 0.0)
    clock.sweep(0.0, period_s=5.0)
    clock.sweep(5.0, period_s=5.0)
    assert clock.sweep(70.0, period_s=5.0) == []  # stopped for 2 lease lengths: 60 s late
    assert clock.sweep(75.0, period_s=5.0) == []
    assert clock.sweep(80.0, period_s=5.0) == []
    assert clock.sweep(85.0, period_s=5.0) == []
    assert clock.sweep(90.0, period_s=5.0) == ["r1"]  # 0 + 30 + 60


def test_a_little_lateness_moves_nothing() -> None:
    clock = LeaseClock(lease_s=10.0)
    clock.open("r1", 0.0)
    clock.sweep(0.0, period_s=5.0)
    clock.sweep(5.9, period_s=5.0)
    assert clock.sweep(10.0, period_s=5.0) == ["r1"]


def test_the_first_sweep_is_never_late() -> None:
    clock = LeaseClock(lease_s=10.0)
    clock.open("r1", 0.0)
    assert clock.sweep(1_000_000.0, period_s=5.0) == ["r1"]


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=30))
def test_a_lease_never_expires_before_its_length_in_time_on_duty(gaps: list[float]) -> None:
    """On duty is what passed less what the loop was late, beyond the second it may be."""
    clock = LeaseClock(lease_s=30.0)
    clock.open("r1", 0.0)
    clock.sweep(0.0, period_s=5.0)
    now = on_duty = 0.0
    for gap in gaps:
        now += gap
        on_duty += gap if gap - 5.0 <= 1.0 else 5.0
        if clock.sweep(now, period_s=5.0):
            assert on_duty >= 30.0 - 1e-6
            return
        assert on_duty < 30.0 + 1e-6


def test_what_is_left_of_a_lease() -> None:
    clock = LeaseClock(lease_s=30.0)
    assert clock.left_s("r", 0.0) is None
    clock.open("r", 100.0)
    assert clock.left_s("r", 112.0) == 18.0
    assert clock.left_s("r", 200.0) == 0.0
