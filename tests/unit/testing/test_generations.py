"""What hand-overs cost, added up from moments; and which runs of the bench prove nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edif_hpc.testing.bench.handover import Report
from edif_hpc.testing.generations import Generation, HandOver, cost

FIRST = Generation(
    allocation="a", name="edif-tiny-0-1", slot=0, number=1, ordered=0.0, submitted=1.0, started=2.0,
    warm=10.0, drained=100.0, ended=110.0, cause="drained",
)  # fmt: skip
SECOND = replace(
    FIRST, allocation="b", number=2, ordered=80.0, started=90.0, warm=99.0, drained=None, ended=190.0
)  # fmt: skip
BUSY = HandOver(old=FIRST, at=100.0, running=3, uploads=1)


def test_one_that_is_there_in_time() -> None:
    found = cost([FIRST, SECOND])
    assert (found.gaps, found.gap_s) == (0, 0.0)
    assert found.overlap_s == 20.0
    assert found.allocated_s == 108.0 + 100.0
    assert found.overlap_share == pytest.approx(20.0 / 208.0)


def test_one_that_comes_too_late_leaves_a_gap() -> None:
    found = cost([FIRST, replace(SECOND, started=115.0, warm=130.0)])
    assert (found.gaps, found.gap_s, found.overlap_s) == (1, 30.0, 0.0)


def test_one_that_never_got_warm_fills_no_gap() -> None:
    third = replace(SECOND, number=3, started=195.0, warm=200.0, ended=300.0)
    assert cost([FIRST, replace(SECOND, warm=None), third]).gap_s == 100.0


def test_slots_are_counted_apart() -> None:
    assert cost([FIRST, replace(SECOND, slot=1)]).overlap_s == 0.0


@pytest.mark.parametrize(
    ("hand_overs", "faults", "ok"),
    [
        ([BUSY], [], True),
        ([BUSY], ["lost"], False),
        ([], [], False),
        ([replace(BUSY, running=0)], [], False),
        ([replace(BUSY, uploads=0)], [], False),
        ([BUSY] * 20 + [replace(BUSY, running=0)], [], True),
    ],
)
def test_a_run_has_to_put_the_promise_to_the_test(
    hand_overs: list[HandOver], faults: list[str], ok: bool
) -> None:
    report = Report(seed=1, slots=1, walltime_min=1, hand_overs=hand_overs, faults=faults)
    assert report.ok is ok
