"""What an operator says of a deployment that is up: more or fewer replicas, and have an allocation replaced."""

from __future__ import annotations

import pytest

from edif_hpc.domain.allocation import AllocationState
from edif_hpc.errors import InvalidInput, NotFound
from edif_hpc.testing.slots import NAME, SITE, SlotRelay, line

A = AllocationState


@pytest.fixture
async def relay() -> SlotRelay:
    made = SlotRelay()
    made.start()
    return made


async def serving(relay: SlotRelay, replicas: int) -> list[str]:
    """So many allocations of a cluster that are warm, by slot."""
    await relay.deploy(replicas=replicas)
    await relay.slots.reconcile()
    orders = await relay.orders.fetch(SITE, "login1", 4)
    for number, order in enumerate(orders):
        await relay.report(submitted=[(order["allocation"], str(number))])
        await relay.runs(order)
    return [str(each["allocation"]) for each in sorted(orders, key=lambda order: order["slot"])]


def states(relay: SlotRelay) -> dict[tuple[int, int], AllocationState]:
    """State by slot and generation."""
    rows = relay.store.allocations(live_only=False)
    return {(each.slot, each.generation): each.state for each in rows}


async def test_a_drained_allocation_is_replaced_at_once(relay: SlotRelay) -> None:
    [first] = await serving(relay, 1)
    await relay.fleet.drain(None, first)
    await relay.slots.reconcile()
    assert states(relay) == {(0, 1): A.DRAINING, (0, 2): A.ORDERED}


async def test_a_drained_allocation_that_waits_is_cancelled_and_ordered_anew(
    relay: SlotRelay,
) -> None:
    await relay.deploy()
    await relay.slots.reconcile()
    [order] = await relay.orders.fetch(SITE, "login1", 4)
    await relay.report(submitted=[(order["allocation"], "7")], jobs=[line(order, "7")])
    await relay.fleet.drain(None, order["allocation"])
    await relay.slots.reconcile()
    [cancel] = await relay.orders.fetch(SITE, "login1", 4)
    assert (cancel["kind"], cancel["job_id"]) == ("cancel", "7")
    await relay.report(cancelled=[order["allocation"]])
    await relay.slots.reconcile()
    assert states(relay) == {(0, 1): A.ENDED, (0, 2): A.ORDERED}


async def test_a_deployment_that_is_drained_as_a_whole_is_not_filled_again(
    relay: SlotRelay,
) -> None:
    await serving(relay, 2)
    await relay.fleet.drain(NAME, None)
    await relay.slots.reconcile()
    assert set(states(relay).values()) == {A.DRAINING}


async def test_more_replicas_are_ordered(relay: SlotRelay) -> None:
    await serving(relay, 1)
    await relay.fleet.scale(NAME, 3)
    await relay.slots.reconcile()
    assert states(relay) == {(0, 1): A.WARM, (1, 1): A.ORDERED, (2, 1): A.ORDERED}


async def test_fewer_replicas_let_the_last_slots_go(relay: SlotRelay) -> None:
    await serving(relay, 3)
    await relay.fleet.scale(NAME, 1)
    await relay.slots.reconcile()
    assert states(relay) == {(0, 1): A.WARM, (1, 1): A.DRAINING, (2, 1): A.DRAINING}


async def test_none_at_all_stays_up(relay: SlotRelay) -> None:
    await serving(relay, 1)
    await relay.fleet.scale(NAME, 0)
    await relay.slots.reconcile()
    assert states(relay) == {(0, 1): A.DRAINING}
    await relay.fleet.scale(NAME, 1)
    await relay.slots.reconcile()
    assert states(relay) == {(0, 1): A.DRAINING, (0, 2): A.ORDERED}


async def test_workers_without_a_walltime_are_let_go_too(relay: SlotRelay) -> None:
    await relay.deploy(replicas=3)
    await relay.fleet.scale(NAME, 3)
    made = [
        await relay.fleet.add(NAME, slot, site="local", walltime_min=None, token=f"t{slot}")
        for slot in range(3)
    ]
    assert all(made)
    await relay.fleet.scale(NAME, 2)
    ended = [each.slot for each in relay.store.allocations(live_only=False) if each.state is A.ENDED]  # fmt: skip
    assert ended == [2]


async def test_a_deployment_that_is_not_there(relay: SlotRelay) -> None:
    with pytest.raises(NotFound, match="deployed: nothing yet"):
        await relay.fleet.scale("nope", 1)


async def test_ps_tells_when_a_successor_is_ordered(relay: SlotRelay) -> None:
    [first] = await serving(relay, 1)
    await relay.slots.reconcile()
    [shown] = relay.fleet.processes()
    left_s, lead_s = shown["left_s"], relay.fleet.expected[NAME].lead_s
    assert shown["successor_due_s"] == pytest.approx(left_s - lead_s, abs=0.2)
    assert shown["successor"] is None

    relay.clock.advance(left_s - lead_s + 1)
    await relay.slots.reconcile()
    shown, follower = sorted(relay.fleet.processes(), key=lambda each: each["generation"])
    assert (shown["successor"], shown["successor_due_s"]) == (follower["name"], None)
    assert first == shown["allocation"]


async def test_nobody_is_due_after_what_leaves(relay: SlotRelay) -> None:
    [first] = await serving(relay, 1)
    await relay.slots.reconcile()
    await relay.fleet.drain(None, first)
    [shown] = relay.fleet.processes()
    assert shown["successor_due_s"] is None


async def test_nobody_is_due_where_nobody_is_wanted(relay: SlotRelay) -> None:
    await serving(relay, 2)
    await relay.slots.reconcile()
    await relay.fleet.scale(NAME, 1)
    due = {each["slot"]: each["successor_due_s"] is not None for each in relay.fleet.processes()}
    assert due == {0: True, 1: False}
    await relay.fleet._change_deployment(NAME, up_at=None)
    assert [each["successor_due_s"] for each in relay.fleet.processes()] == [None, None]


async def test_launchers_that_were_heard_of(relay: SlotRelay) -> None:
    assert relay.orders.heard() == {}
    await relay.orders.fetch(SITE, "login1", 4)
    relay.clock.advance(5.0)
    assert relay.orders.heard() == {SITE: {"name": "login1", "silent_s": 5.0}}


async def test_a_walltime_that_is_all_margin_is_refused(relay: SlotRelay) -> None:
    """A worker would leave as soon as it is warm, and job follow job."""
    with pytest.raises(InvalidInput, match=r"serves nobody.*ask for 3 min or more"):
        await relay.deploy(walltime_min=2)
    assert relay.store.deployments()[0].up_at is None
    await relay.up(walltime_min=3)
