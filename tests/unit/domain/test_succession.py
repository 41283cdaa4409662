"""What follows for a slot, from its facts alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from edif_hpc.domain.allocation import AllocationState
from edif_hpc.domain.governor import Permit
from edif_hpc.domain.learning import Times
from edif_hpc.domain.succession import (
    Cancel,
    Decision,
    Drain,
    Member,
    Order,
    Slot,
    Wanted,
    outlook,
    plan,
    staggered,
)

A = AllocationState
HOUR = 3600.0
TIMES = Times(wait_s=600.0, warmup_s=120.0, request_s=60.0)  # a lead of 900 s
WANTED = Wanted(replicas=1, walltime_s=8 * HOUR, margin_s=95.0)
QOS = "QOSMaxJobsPerUserLimit"


def member(state: AllocationState, generation: int = 1, **facts: Any) -> Member:
    running = state not in {A.ORDERED, A.SUBMITTED}
    base = Member(
        allocation=f"g{generation}",
        generation=generation,
        state=state,
        walltime_s=8 * HOUR,
        left_s=4 * HOUR if running else None,
        held=state is A.SUBMITTED,
    )
    return replace(base, **facts)


def decide(*members: Member, wanted: Wanted = WANTED, times: Times = TIMES) -> Decision:
    (decision,) = plan([Slot(index=0, members=members)], wanted, times)
    return decision


def test_an_empty_slot_is_ordered() -> None:
    assert decide().actions == (Order(slot=0, walltime_s=8 * HOUR),)


@pytest.mark.parametrize("state", [A.ORDERED, A.SUBMITTED])
def test_one_that_waits_is_waited_for(state: AllocationState) -> None:
    told = decide(member(state, reason="Priority", start_in_s=300.0))
    assert told.actions == ()
    assert "waits" in told.why


def test_a_successor_is_ordered_when_the_lead_is_left() -> None:
    early = decide(member(A.WARM, left_s=901.0))
    assert early.actions == ()
    assert "ordered in 1 s" in early.why
    assert decide(member(A.WARM, left_s=900.0)).actions == (Order(slot=0, walltime_s=8 * HOUR),)


@pytest.mark.parametrize("state", [A.LOADING, A.WARM])
@pytest.mark.parametrize("follows", [A.ORDERED, A.SUBMITTED, A.STARTED, A.LOADING])
def test_there_is_one_successor(state: AllocationState, follows: AllocationState) -> None:
    told = decide(member(state, left_s=500.0), member(follows, 2))
    assert told.actions == ()
    assert "generation 2" in told.why


def test_the_old_drains_when_the_new_is_warm() -> None:
    (drain,) = decide(member(A.WARM), member(A.WARM, 2)).actions
    assert drain == Drain(allocation="g1", why="generation 2 takes its place")


def test_a_warm_one_makes_older_ones_surplus() -> None:
    told = decide(member(A.SUBMITTED), member(A.LOADING, 2), member(A.WARM, 3))
    assert set(told.actions) == {
        Cancel(allocation="g1", why="generation 3 takes its place"),
        Drain(allocation="g2", why="generation 3 takes its place"),
    }


def test_of_two_successors_the_one_that_is_further_stays() -> None:
    told = decide(member(A.WARM), member(A.SUBMITTED, 2), member(A.LOADING, 3))
    assert told.actions == (Cancel(allocation="g2", why="generation 3 takes its place"),)


def test_the_one_that_is_further_takes_the_place_of_the_older() -> None:
    told = decide(member(A.STARTED), member(A.LOADING, 2))
    assert told.actions == (Drain(allocation="g1", why="generation 2 takes its place"),)


def test_near_its_end_it_drains_though_nobody_follows() -> None:
    assert decide(member(A.WARM, left_s=96.0), member(A.SUBMITTED, 2)).actions == ()
    (drain,) = decide(member(A.WARM, left_s=95.0), member(A.SUBMITTED, 2)).actions
    assert isinstance(drain, Drain)
    assert "walltime ends" in drain.why


def test_what_drains_is_not_counted() -> None:
    assert decide(member(A.DRAINING)).actions == (Order(slot=0, walltime_s=8 * HOUR),)
    assert decide(member(A.DRAINING), member(A.LOADING, 2)).actions == ()


def test_a_limit_that_keeps_the_successor_out_ends_the_old_one_in_time() -> None:
    pending = member(A.SUBMITTED, 2, reason=f"({QOS})")
    early = decide(member(A.WARM, left_s=600.0), pending)
    assert early.actions == ()
    assert "gap" in early.why
    assert "limit" in early.advice
    (drain,) = decide(member(A.WARM, left_s=155.0), pending).actions
    assert isinstance(drain, Drain)
    assert QOS in drain.why
    busy = replace(pending, reason="Resources")
    assert decide(member(A.WARM, left_s=155.0), busy).actions == ()


def test_a_reason_that_never_clears_is_said() -> None:
    told = decide(member(A.SUBMITTED, reason="PartitionTimeLimit"))
    assert "--walltime" in told.advice


def test_without_an_end_nothing_follows() -> None:
    assert decide(member(A.WARM, left_s=None)).actions == ()


def test_what_nobody_wants_goes() -> None:
    wanted = replace(WANTED, replicas=0, walltime_s=None)
    told = decide(member(A.WARM), member(A.SUBMITTED, 2), wanted=wanted)
    why = "nobody wants it any more"
    assert told.actions == (Drain(allocation="g1", why=why), Cancel(allocation="g2", why=why))
    assert decide(member(A.DRAINING), wanted=wanted).actions == ()


def test_what_can_never_start_is_withdrawn_when_an_operator_asks_anew() -> None:
    stuck = member(A.SUBMITTED, reason="PartitionTimeLimit", age_s=600.0)
    assert decide(stuck, wanted=replace(WANTED, up_s=900.0)).actions == ()
    told = decide(stuck, wanted=replace(WANTED, up_s=5.0))
    assert told.actions == (Cancel(allocation="g1", why=told.why),)
    assert "PartitionTimeLimit" in told.why
    busy = replace(stuck, reason="Priority")
    assert decide(busy, wanted=replace(WANTED, up_s=5.0)).actions == ()
    successor = member(A.SUBMITTED, generation=2, reason="PartitionTimeLimit", age_s=600.0)
    beside = decide(member(A.WARM), successor, wanted=replace(WANTED, up_s=5.0))
    assert [each.allocation for each in beside.actions if isinstance(each, Cancel)] == ["g2"]


@pytest.mark.parametrize("facts", [(), (member(A.WARM, left_s=500.0),)])
def test_nothing_is_ordered_without_a_permit(facts: tuple[Member, ...]) -> None:
    paused = replace(WANTED, permit=Permit(paused=True, reason="paused: it died"))
    told = decide(*facts, wanted=paused)
    assert told.actions == ()
    assert "it died" in told.why
    assert "edif-hpc up" in told.why
    waits = replace(WANTED, permit=Permit(wait_s=300.0, reason="it died"))
    assert "in 5 min" in decide(*facts, wanted=waits).why


def test_an_order_that_nobody_took_is_withdrawn_when_the_permit_is() -> None:
    paused = replace(WANTED, permit=Permit(paused=True, reason="paused"))
    for before in ((), (member(A.WARM, left_s=500.0),)):
        told = decide(*before, member(A.ORDERED, 2), wanted=paused)
        assert [type(each) for each in told.actions] == [Cancel]
        assert decide(*before, member(A.ORDERED, 2, held=True), wanted=paused).actions == ()


# -- long queues ---------------------------------------------------------------------------------


def test_a_lead_as_long_as_the_walltime_orders_at_the_start() -> None:
    slow = replace(TIMES, wait_s=20 * HOUR)
    told = decide(member(A.STARTED, left_s=8 * HOUR), times=slow)
    assert told.actions == (Order(slot=0, walltime_s=8 * HOUR),)
    assert told.gap_s == slow.lead_s - 8 * HOUR
    assert "3 staggered replicas" in told.advice


def test_no_gap_no_advice() -> None:
    assert outlook(WANTED, TIMES) == (0.0, "")
    assert outlook(replace(WANTED, walltime_s=None), TIMES) == (0.0, "")


def test_enough_replicas_need_no_advice_and_a_short_walltime_has_its_own() -> None:
    slow = replace(TIMES, wait_s=20 * HOUR)
    assert outlook(replace(WANTED, replicas=3), slow)[1] == ""
    assert "too short" in outlook(replace(WANTED, walltime_s=200.0), slow)[1]


# -- the stagger ---------------------------------------------------------------------------------


def walltimes(decisions: list[Decision]) -> list[float]:
    orders = [each.actions[0] for each in decisions]
    return [each.walltime_s / HOUR for each in orders if isinstance(each, Order)]


def test_replicas_that_begin_together_end_apart() -> None:
    wanted = replace(WANTED, replicas=4)
    told = plan([Slot(index=index) for index in range(4)], wanted, TIMES)
    assert walltimes(told) == [8.0, 6.0, 4.0, 2.0]
    begin = [a.begin_after_s for each in told for a in each.actions if isinstance(a, Order)]
    assert begin == [0.0] * 4


def test_where_a_shorter_walltime_leaves_no_room_they_begin_apart() -> None:
    slow = replace(TIMES, wait_s=20 * HOUR)
    wanted = replace(WANTED, replicas=2)
    told = plan([Slot(index=0), Slot(index=1)], wanted, slow)
    assert told[0].actions == (Order(slot=0, walltime_s=8 * HOUR),)
    assert told[1].actions == (Order(slot=1, walltime_s=8 * HOUR, begin_after_s=4 * HOUR),)


def test_a_successor_keeps_its_distance_and_never_begins_late() -> None:
    wanted = replace(WANTED, replicas=2)
    end_s = TIMES.wait_s + 8 * HOUR
    far = staggered(wanted, TIMES, [end_s - 4 * HOUR], may_wait=False)
    assert far == (0.0, 8 * HOUR)
    near = staggered(wanted, TIMES, [end_s - 0.1 * HOUR], may_wait=False)
    assert near == (0.0, 4 * HOUR)
    slow = replace(TIMES, wait_s=20 * HOUR)
    assert staggered(wanted, slow, [28 * HOUR], may_wait=False) == (0.0, 8 * HOUR)


def test_the_same_facts_decide_the_same() -> None:
    facts = [Slot(index=0, members=(member(A.WARM, left_s=800.0),)), Slot(index=1)]
    wanted = replace(WANTED, replicas=2)
    assert plan(facts, wanted, TIMES) == plan(facts, wanted, TIMES)
