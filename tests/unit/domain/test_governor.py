"""The brakes: tokens, back-off, pause, bad nodes; and what counts as a death."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.allocation import Allocation, AllocationState
from edif_hpc.domain.governor import (
    BAD_NODE_S,
    REFUSED,
    Permit,
    Tokens,
    Trial,
    back_off_s,
    bad_nodes,
    permit,
    trial_of,
)

ROW = Allocation(
    id="a" * 16,
    deployment="tiny",
    slot=0,
    generation=1,
    site="hpc",
    state=AllocationState.ENDED,
    submitted_at=0.0,
    ended_at=50.0,
    cause="gone",
    detail="one\ntwo\nthree\nfour",
    node="n1",
)


def died(at: float, **facts: Any) -> Trial:
    return replace(Trial(at=at, warm=False, cause="gone"), **facts)


@given(st.lists(st.floats(0.0, 120.0), max_size=60))
def test_no_window_sees_more_than_its_tokens(steps: list[float]) -> None:
    tokens, now, taken = Tokens(limit=3, window_s=100.0), 0.0, []
    for step in steps:
        now += step
        if tokens.free(now):
            assert tokens.next_in_s(now) == 0.0
            tokens.take(now)
            taken.append(now)
        else:
            assert 0.0 < tokens.next_in_s(now) <= 100.1
    for end in taken:
        assert sum(1 for at in taken if end - 100.0 < at <= end) <= 3


def test_the_pauses_grow_to_an_hour() -> None:
    assert [back_off_s(count) for count in range(7)] == [0, 0, 60, 300, 900, 3600, 3600]


def test_one_that_was_warm_clears_the_count() -> None:
    trials = [died(10.0), died(20.0), Trial(at=30.0, warm=True)]
    assert permit(trials, now=40.0, since=0.0) == Permit()
    assert permit([*trials, died(35.0)], now=40.0, since=0.0).granted


def test_the_second_death_waits_and_the_third_pauses() -> None:
    second = permit([died(10.0), died(20.0)], now=50.0, since=0.0)
    assert (second.granted, second.wait_s) == (False, 30.0)
    assert permit([died(10.0), died(20.0)], now=80.0, since=0.0).granted
    third = permit([died(10.0), died(20.0), died(30.0, cause="no image")], now=1e6, since=0.0)
    assert third.paused
    assert not third.granted
    assert "no image" in third.reason


def test_up_forgets_what_was_before() -> None:
    trials = [died(10.0), died(20.0), died(30.0)]
    assert permit(trials, now=40.0, since=31.0) == Permit()
    assert permit([*trials, died(40.0)], now=40.0, since=31.0).granted


def test_what_the_scheduler_never_takes_pauses_at_once() -> None:
    assert permit([died(10.0, final=True)], now=1e6, since=0.0).paused


@pytest.mark.parametrize("cause", ["drained", "cancelled", "refused by the relay"])
def test_what_we_ended_ourselves_is_no_death(cause: str) -> None:
    assert trial_of(replace(ROW, cause=cause)) is None


def test_what_an_allocation_says() -> None:
    trial = trial_of(ROW)
    assert trial is not None
    assert (trial.at, trial.warm, trial.node) == (50.0, False, "n1")
    assert trial.cause == "gone: two | three | four"
    assert trial_of(replace(ROW, warm_at=30.0)) == Trial(
        at=30.0, warm=True, deployment="tiny", node="n1"
    )
    assert trial_of(replace(ROW, ended_at=None, state=AllocationState.LOADING)) is None
    final = trial_of(replace(ROW, cause=REFUSED))
    assert final is not None
    assert final.final


def test_two_deaths_in_a_day_make_a_bad_node() -> None:
    trials = [died(10.0, node="n1"), died(20.0, node="n1"), died(20.0, node="n2"), died(1.0)]
    trials += [Trial(at=5.0, warm=True, node="n2")]
    assert bad_nodes(trials, now=30.0) == ("n1",)
    assert bad_nodes(trials, now=10.0 + BAD_NODE_S) == ()


def test_a_deployment_that_gets_warm_nowhere_blames_no_node() -> None:
    """Else one broken model takes a small cluster away from all the others."""
    broken = [died(float(at), node=f"n{at % 2}", deployment="broken") for at in range(6)]
    sound = [Trial(at=7.0, warm=True, deployment="sound", node="n1")]
    assert bad_nodes([*broken, *sound], now=30.0) == ()
    works_elsewhere = Trial(at=8.0, warm=True, deployment="broken", node="n7")
    assert bad_nodes([*broken, works_elsewhere], now=30.0) == ("n0", "n1")


def test_a_bad_node_is_forgiven() -> None:
    """Else what was wrong with the site for an hour would leave out its nodes for a day."""
    trials = [Trial(at=1.0, warm=True, deployment="tiny", node="n1")]
    trials += [died(float(at), node=f"n{at % 2}", deployment="tiny") for at in range(10, 14)]
    assert bad_nodes(trials, now=30.0) == ("n0", "n1")
    assert bad_nodes(trials, now=30.0, since={"tiny": 20.0}) == (), "an operator said `up`"
    assert bad_nodes(trials, now=30.0, since={"other": 20.0}) == ("n0", "n1")
    warm = Trial(at=25.0, warm=True, deployment="tiny", node="n0")
    assert bad_nodes([*trials, warm], now=30.0) == ("n1",)
