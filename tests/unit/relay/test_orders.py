"""Orders: given out once, given out again only with proof, and no job that is one too many."""

from __future__ import annotations

from typing import Any

import pytest

from edif_hpc.domain.allocation import AllocationState
from edif_hpc.domain.governor import BACK_OFF_S, WINDOW_S
from edif_hpc.domain.order import ORDER_LEASE_S
from edif_hpc.errors import InvalidInput, NotAuthenticated, NotFound
from edif_hpc.relay.jobs import LISTINGS_APART_S
from edif_hpc.relay.orders import GONE
from edif_hpc.testing.slots import NAME, SILENT_S, SITE, SlotRelay, line

A = AllocationState


@pytest.fixture
async def relay() -> SlotRelay:
    made = SlotRelay()
    made.start()
    await made.deploy()
    await made.slots.reconcile()
    return made


async def fetch(relay: SlotRelay, launcher: str = "login1", kind: str = "submit") -> list[Any]:
    found = await relay.orders.fetch(SITE, launcher, 4)
    return [each for each in found if each["kind"] == kind]


async def missed_twice(relay: SlotRelay, launcher: str = "login1") -> None:
    await relay.report(launcher, jobs=[])
    relay.clock.advance(LISTINGS_APART_S)
    await relay.report(launcher, jobs=[])


async def submitted(relay: SlotRelay, job_id: str = "77") -> dict[str, Any]:
    (order,) = await fetch(relay)
    await relay.report(submitted=[(order["allocation"], job_id)])
    made: dict[str, Any] = order
    return made


async def test_an_order_tells_all_that_a_launcher_needs(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    row = relay.row(order["allocation"])
    assert order == {
        "kind": "submit", "allocation": row.id, "name": row.name, "join_token": order["join_token"],
        "deployment": NAME, "slot": 0, "generation": 1, "gpu": None, "gpus": 1, "walltime_min": 60,
        "exclude": [], "begin_after_s": 0.0,
    }  # fmt: skip
    assert (row.state, row.order_holder) == (A.ORDERED, "login1")
    assert order["join_token"] not in repr(relay.store._committed), "a token is never stored"


async def test_an_order_is_given_to_one_launcher(relay: SlotRelay) -> None:
    assert await fetch(relay)
    assert not await fetch(relay, "login2")
    assert not await fetch(relay), "nor again to the same: its job may exist"
    relay.clock.advance(ORDER_LEASE_S + 1)
    assert not await fetch(relay, "login2"), "nor when the lease is over"


async def test_only_proof_gives_it_out_again(relay: SlotRelay) -> None:
    (first,) = await fetch(relay)
    relay.clock.advance(ORDER_LEASE_S + 1)
    await relay.report("login2", jobs=[])
    assert not await fetch(relay, "login2"), "one listing may be older than the job"
    await relay.report("login2", jobs=None)
    await relay.report("login1", jobs=[])
    assert not await fetch(relay, "login2"), "two launchers' listings may both be old"
    relay.clock.advance(LISTINGS_APART_S)
    await relay.report("login2", jobs=[])
    (second,) = await fetch(relay, "login2")
    assert second["allocation"] == first["allocation"]
    with pytest.raises(NotAuthenticated):
        await relay.runs(first)
    assert not await fetch(relay, "login2"), "what was missed before proves nothing of this one"
    await relay.runs(second)


async def test_another_waits_for_the_end_of_the_lease(relay: SlotRelay) -> None:
    (first,) = await fetch(relay)
    await missed_twice(relay, "login2")
    assert not await fetch(relay, "login2")
    assert (await fetch(relay))[0]["allocation"] == first["allocation"], (
        "the holder may, with proof"
    )


async def test_what_a_dead_launcher_submitted_is_adopted(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    await relay.report("login2", jobs=[line(order, "77", reason="Priority", start_in_s=600.0)])
    row = relay.row(order["allocation"])
    assert (row.state, row.job_id) == (A.SUBMITTED, "77")
    await relay.slots.reconcile()
    (told,) = relay.fleet.processes()
    assert (told["reason"], told["start_in_s"]) == ("Priority", 600.0)
    assert "Priority" in told["why"]
    assert "10 min" in told["why"]


async def test_a_pilot_may_be_quicker_than_the_report(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    await relay.runs(order)
    await relay.report(submitted=[(order["allocation"], "77")])
    row = relay.row(order["allocation"])
    assert (row.state, row.job_id) == (A.WARM, "77")


async def test_a_late_report_makes_a_stray(relay: SlotRelay) -> None:
    (first,) = await fetch(relay)
    relay.clock.advance(ORDER_LEASE_S + 1)
    await missed_twice(relay, "login2")
    (second,) = await fetch(relay, "login2")
    await relay.report("login2", submitted=[(second["allocation"], "78")])
    await relay.report("login1", submitted=[(first["allocation"], "77")])
    assert relay.row(first["allocation"]).job_id == "78"
    (cancel,) = await fetch(relay, kind="cancel")
    assert (cancel["allocation"], cancel["job_id"]) == (first["allocation"], "77")
    await relay.report(cancelled=[first["allocation"]])
    assert relay.row(first["allocation"]).state is A.SUBMITTED, (
        "the stray is gone, not the right one"
    )
    assert not await fetch(relay, kind="cancel")


async def test_a_second_job_of_a_name_is_a_stray(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.report(
        jobs=[line(order, "77"), line(order, "76"), line(order, "75", "COMPLETING")]
    )
    assert [each["job_id"] for each in await fetch(relay, kind="cancel")] == ["76"]
    await relay.report(jobs=[line(order, "77")])
    assert not await fetch(relay, kind="cancel")


async def test_a_job_outlives_its_allocation(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.fleet.end(order["allocation"], cause="lost")
    await relay.report(jobs=[line(order, "77", "RUNNING")])
    assert not await fetch(relay, kind="cancel"), "it may be leaving"
    relay.clock.advance(200.0)
    await relay.report(jobs=[line(order, "77", "RUNNING")])
    assert [each["job_id"] for each in await fetch(relay, kind="cancel")] == ["77"]


async def test_jobs_of_others_are_left_alone(relay: SlotRelay) -> None:
    await submitted(relay)
    other = {"name": "edif-tiny-0-1-deadbeef"}
    await relay.report(jobs=[line(other, "9", "RUNNING")])
    assert not await fetch(relay, kind="cancel")


async def test_gone_needs_two_listings_and_a_silent_pilot(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.report(jobs=[])
    await relay.report(jobs=None)
    relay.clock.advance(LISTINGS_APART_S)
    await relay.report(jobs=[line(order, "77")])
    relay.clock.advance(LISTINGS_APART_S)
    await relay.report(jobs=[])
    assert relay.row(order["allocation"]).state is A.SUBMITTED
    relay.clock.advance(LISTINGS_APART_S)
    await relay.report(jobs=[])
    row = relay.row(order["allocation"])
    assert (row.state, row.cause) == (A.ENDED, GONE)
    assert "77" in row.detail


async def test_the_log_says_why_a_job_is_gone_that_never_spoke(relay: SlotRelay) -> None:
    order = await submitted(relay)
    assert not await fetch(relay, kind="words")
    await relay.report(jobs=[])
    wanted = {key: order[key] for key in ("allocation", "name")} | {
        "kind": "words",
        "job_id": "77",
    }
    assert await fetch(relay, kind="words") == [wanted]
    await relay.report(words=[(order["allocation"], "python3: command not found")])
    assert not await fetch(relay, kind="words"), "it is asked once"
    assert relay.row(order["allocation"]).state is A.SUBMITTED, "a log is no proof of an end"
    relay.clock.advance(LISTINGS_APART_S)
    await relay.report(jobs=[])
    row = relay.row(order["allocation"])
    assert row.cause == GONE
    assert row.detail.endswith("(job 77); its log ends:\npython3: command not found")


async def test_no_log_is_asked_for_while_the_pilot_speaks(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.runs(order)
    await relay.report(jobs=[])
    assert not await fetch(relay, kind="words")


async def test_a_pilot_that_speaks_is_not_gone(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.runs(order)
    await missed_twice(relay)
    await relay.report(jobs=[line(order, "77", "TIMEOUT")])
    assert relay.row(order["allocation"]).state is A.WARM
    relay.clock.advance(SILENT_S)
    await relay.report(jobs=[line(order, "77", "NODE_FAIL", node="n7")])
    row = relay.row(order["allocation"])
    assert (row.state, row.cause) == (A.ENDED, GONE)
    assert "node_fail" in row.detail


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETING", "SUSPENDED", "REQUEUE_FED", "weird"])
async def test_an_unknown_state_is_alive(relay: SlotRelay, state: str) -> None:
    order = await submitted(relay)
    relay.clock.advance(SILENT_S + 1)
    await relay.report(jobs=[line(order, "77", state)])
    assert relay.row(order["allocation"]).state is A.SUBMITTED


async def test_no_more_than_the_governor_permits() -> None:
    relay = SlotRelay(submits=2)
    relay.start()
    await relay.deploy(replicas=5)
    await relay.slots.reconcile()
    assert len(await fetch(relay)) == 2
    relay.clock.advance(WINDOW_S - 1)
    assert not await fetch(relay)
    relay.start()  # a relay that was started anew counts them too
    assert not await fetch(relay)
    relay.clock.advance(1.0)
    assert len(await fetch(relay)) == 2


async def test_a_permit_counts_when_the_order_is_fetched(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    await relay.runs(order, warm=False)
    relay.fleet.pilot_spoke(order["allocation"], relay.clock.monotonic(), left_s=600.0)
    await relay.slots.reconcile()
    assert [each.state for each in relay.fleet.live()] == [A.LOADING, A.ORDERED]
    await relay.fleet.end(order["allocation"], cause="gone")
    relay.fleet.past.extend([relay.row(order["allocation"])] * 2)
    assert not await fetch(relay), "it died three times since the slots were looked at"


async def test_a_refusal_backs_off(relay: SlotRelay) -> None:
    for pause_s in BACK_OFF_S[1:]:
        (order,) = await fetch(relay)
        await relay.report(refused=[(order["allocation"], "quota", "QOSMaxSubmitJobPerUserLimit")])
        assert relay.row(order["allocation"]).order_holder is None
        relay.clock.advance(pause_s - 1)
        assert not await fetch(relay)
        assert "QOSMaxSubmit" in relay.fleet.processes()[0]["detail"]
        relay.clock.advance(1.0)
    assert await fetch(relay)


async def test_a_refusal_for_good_pauses_until_up(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    await relay.report(refused=[(order["allocation"], "config", "invalid partition specified")])
    assert relay.row(order["allocation"]).state is A.ENDED
    relay.clock.advance(7200.0)
    await relay.slots.reconcile()
    assert not await fetch(relay)
    why = relay.slots.explain(NAME, 0)["why"]
    assert "paused" in why
    assert "invalid partition" in why
    await relay.up()
    await relay.slots.reconcile()
    assert (await fetch(relay))[0]["generation"] == 2


async def test_a_node_where_two_died_is_left_out_of_orders(relay: SlotRelay) -> None:
    for warm, cause in [(True, "drained"), (False, "gone"), (False, "gone")]:
        relay.clock.advance(WINDOW_S)
        await relay.slots.reconcile()
        (order,) = await fetch(relay)
        await relay.runs(order, warm=warm)
        await relay.fleet.end(order["allocation"], cause=cause)
    relay.clock.advance(WINDOW_S)
    await relay.slots.reconcile()
    assert relay.slots.explain(NAME, 0)["excluded_nodes"] == ("n1",)
    assert (await fetch(relay))[0]["exclude"] == ["n1"]


async def test_three_deaths_pause(relay: SlotRelay) -> None:
    for _ in range(3):
        relay.clock.advance(WINDOW_S)
        await relay.slots.reconcile()
        (order,) = await fetch(relay)
        await relay.runs(order, warm=False)
        await relay.fleet.end(
            order["allocation"], cause="the pilot failed", detail="no such image"
        )
    relay.clock.advance(7200.0)
    await relay.slots.reconcile()
    assert not await fetch(relay)
    told = relay.slots.explain(NAME, 0)
    assert "3 allocations in a row" in told["why"]
    assert "no such image" in told["why"]
    assert told["excluded_nodes"] == (), "it was warm nowhere: it is not the node"
    await relay.up()
    await relay.slots.reconcile()
    assert (await fetch(relay))[0]["exclude"] == []


async def test_down_cancels_what_waits_and_stays_down(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.fleet.drain(NAME, None)
    await relay.slots.reconcile()
    (cancel,) = await fetch(relay, kind="cancel")
    assert (cancel["job_id"], cancel["name"]) == ("77", order["name"])
    await relay.report(cancelled=[order["allocation"]])
    assert relay.row(order["allocation"]).cause == "cancelled"
    await relay.slots.reconcile()
    assert relay.fleet.live() == []
    assert not await fetch(relay)


async def test_down_waits_for_proof_of_what_may_have_been_submitted(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    await relay.fleet.drain(NAME, None)
    await relay.slots.reconcile()
    assert not await fetch(relay, kind="cancel")
    await missed_twice(relay, "login2")
    assert relay.row(order["allocation"]).state is A.ORDERED, "its holder may be submitting it"
    relay.clock.advance(ORDER_LEASE_S)
    await relay.report("login2", jobs=[line(order, "77")])
    (cancel,) = await fetch(relay, kind="cancel")
    assert cancel["job_id"] == "77"


async def test_down_ends_what_was_never_submitted(relay: SlotRelay) -> None:
    (order,) = await fetch(relay)
    await relay.fleet.drain(NAME, None)
    await relay.slots.reconcile()
    relay.clock.advance(ORDER_LEASE_S)
    await missed_twice(relay)
    assert relay.row(order["allocation"]).cause == "cancelled"


async def test_one_that_is_drained_is_replaced(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.fleet.drain(None, order["allocation"])
    await relay.slots.reconcile()
    assert await fetch(relay, kind="cancel")
    await relay.report(cancelled=[order["allocation"]])
    await relay.slots.reconcile()
    assert (await fetch(relay))[0]["generation"] == 2


async def test_the_ticket_goes_to_the_pilot_before(relay: SlotRelay) -> None:
    order = await submitted(relay)
    mine = order["allocation"]
    assert await relay.orders.revive(mine, may_submit=True) == "no successor is ordered yet"
    await relay.runs(order)
    relay.fleet.pilot_spoke(mine, relay.clock.monotonic(), left_s=600.0)
    await relay.slots.reconcile()
    told = await relay.orders.revive(mine, may_submit=False)
    assert "waits for a launcher" in told
    ticket = await relay.orders.revive(mine, may_submit=True)
    assert isinstance(ticket, dict)
    assert (ticket["generation"], ticket["walltime_min"]) == (2, 60)
    assert not await fetch(relay), "a launcher does not get it as well"
    again = await relay.orders.revive(mine, may_submit=True)
    assert isinstance(again, dict)
    assert again["join_token"] != ticket["join_token"]
    await relay.orders.submitted(ticket["allocation"], mine, "78")
    assert relay.row(ticket["allocation"]).state is A.SUBMITTED
    told = await relay.orders.revive(mine, may_submit=True)
    assert "job 78" in told


async def test_the_old_serves_until_the_new_is_warm(relay: SlotRelay) -> None:
    order = await submitted(relay)
    await relay.runs(order)
    relay.fleet.pilot_spoke(order["allocation"], relay.clock.monotonic(), left_s=600.0)
    await relay.slots.reconcile()
    (next_one,) = await fetch(relay)
    await relay.runs(next_one, warm=False)
    await relay.slots.reconcile()
    assert relay.row(order["allocation"]).state is A.WARM
    await relay.fleet.note(next_one["allocation"], A.WARM)
    await relay.slots.reconcile()
    assert relay.row(order["allocation"]).state is A.DRAINING
    assert relay.row(next_one["allocation"]).state is A.WARM


async def test_a_site_with_a_scheduler_needs_a_walltime() -> None:
    relay = SlotRelay()
    relay.start()
    with pytest.raises(InvalidInput, match="--walltime"):
        await relay.deploy(walltime_min=None)  # type: ignore[arg-type]


async def test_on_the_local_site_the_operator_submits_the_first() -> None:
    relay = SlotRelay()
    relay.start()
    await relay.deploy(site="local")
    (made,) = await relay.up(site="local") or [None]
    assert made is None, "the slot is filled already"
    (row,) = relay.fleet.live()
    assert (row.state, row.walltime_min, row.order_holder) == (A.SUBMITTED, 60, None)
    await relay.fleet.failed(row.id, cause="launch failed", detail="")
    await relay.slots.reconcile()
    (order,) = relay.fleet.live()
    assert order.state is A.ORDERED
    (made,) = await relay.up(site="local")
    assert made["allocation"].id == order.id, "`up` takes the order over"
    await relay.fleet.submitted(order.id, job_id="4711")
    assert relay.row(order.id).state is A.SUBMITTED
    await relay.runs({**made, "allocation": order.id})
    assert relay.row(order.id).state is A.WARM


async def test_a_slot_is_known_as_soon_as_it_is_wanted(relay: SlotRelay) -> None:
    """Whoever says `up` and looks at once sees a slot of which nothing was decided yet."""
    await relay.fleet.allocate(NAME, site=SITE, walltime_min=60, slots=2)
    assert relay.slots.explain(NAME, 1)["generations"] == []
    with pytest.raises(NotFound, match="it wants 2 replicas"):
        relay.slots.explain(NAME, 2)
