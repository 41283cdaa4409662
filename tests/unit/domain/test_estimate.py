"""What is expected of runs: decisions have a prior, people are told only what was seen."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.estimate import PRIOR_S, RunTimes, rest_s, start_in_s


def test_no_run_is_no_mean_and_the_prior() -> None:
    times = RunTimes([])
    assert (times.mean_s, times.typical_s) == (None, PRIOR_S)
    times.add(2.0)
    times.add(4.0)
    assert (times.mean_s, times.typical_s) == (3.0, PRIOR_S)


def test_a_run_past_the_mean_is_expected_to_last_as_long_again() -> None:
    assert rest_s(10.0, 4.0) == 6.0
    assert rest_s(10.0, 15.0) == 15.0


@pytest.mark.parametrize(
    ("free_in_s", "ahead", "mean_s", "start"),
    [
        ([], 0, 5.0, None),
        ([0.0], 0, None, 0.0),
        ([7.0], 0, None, 7.0),
        ([7.0], 2, 5.0, 17.0),
        ([7.0], 1, None, None),
        ([7.0, 1.0], 1, 5.0, 7.0),
        ([7.0, 1.0], 2, 5.0, 6.0),
    ],
)
def test_the_start(
    free_in_s: list[float], ahead: int, mean_s: float | None, start: float | None
) -> None:
    assert start_in_s(free_in_s, ahead, mean_s) == start


@given(
    free=st.lists(st.floats(0, 1e4), min_size=1, max_size=8),
    ahead=st.integers(0, 50),
    mean_s=st.floats(0.1, 1e4),
)
def test_who_waits_behind_more_never_starts_earlier_by_more_than_a_run(
    free: list[float], ahead: int, mean_s: float
) -> None:
    alike = [min(each, mean_s) for each in free]  # what runs is never longer than the mean here
    now, later = (start_in_s(alike, count, mean_s) for count in (ahead, ahead + 1))
    assert now is not None
    assert later is not None
    assert later >= now or math.isclose(later, now)  # sums of floats
