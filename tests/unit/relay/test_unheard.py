"""Allocations whose pilot could not speak to the relay: a launcher tells why."""

from __future__ import annotations

from typing import Any

import pytest

from edif_hpc.domain.allocation import AllocationState
from edif_hpc.domain.governor import AWAY, trial_of
from edif_hpc.relay.orders import NEVER_JOINED
from edif_hpc.testing.slots import SITE, SlotRelay, line


@pytest.fixture
async def relay() -> SlotRelay:
    made = SlotRelay()
    made.start()
    await made.deploy()
    await made.slots.reconcile()
    return made


async def submitted(relay: SlotRelay) -> dict[str, Any]:
    (order,) = await relay.orders.fetch(SITE, "login1", 4)
    await relay.report(submitted=[(order["allocation"], "77")])
    return dict(order)


async def test_it_ends_with_its_own_words(relay: SlotRelay) -> None:
    """Also when the same listing shows that its job is over, which would tell less."""
    order = await submitted(relay)
    over = [line(order, "77", "FAILED")]
    await relay.report(jobs=over, unheard=[(order["name"], "n7", "no route to the relay")])
    row = relay.row(order["allocation"])
    assert row.state is AllocationState.ENDED
    assert (row.cause, row.detail, row.node) == (NEVER_JOINED, "no route to the relay", "n7")
    await relay.report(unheard=[(order["name"], "n7", "no route to the relay")])


async def test_a_site_speaks_of_its_own(relay: SlotRelay) -> None:
    order = await submitted(relay)
    said = [(order["name"], "n7", "no route")]
    everything = {"submitted": [], "refused": [], "cancelled": [], "jobs": None}
    await relay.orders.report("elsewhere", "login9", **everything, unheard=said)
    assert relay.row(order["allocation"]).state is not AllocationState.ENDED


async def test_words_of_a_second_job_do_not_end_what_serves(relay: SlotRelay) -> None:
    """A job that was submitted twice: the one without a good token leaves words under the same name."""
    order = await submitted(relay)
    await relay.runs(order)
    await relay.report(unheard=[(order["name"], "n7", "HTTP 401")])
    assert relay.row(order["allocation"]).state is AllocationState.WARM


async def test_who_found_no_relay_is_not_to_blame(relay: SlotRelay) -> None:
    """Jobs that start while the relay is away must not pause their deployment."""
    order = await submitted(relay)
    relay.clock.advance(600.0)
    relay.start()
    await relay.report(unheard=[(order["name"], "n7", "no route to the relay")])
    row = relay.row(order["allocation"])
    assert (row.cause, row.detail) == (AWAY, "no route to the relay")
    assert trial_of(row) is None
    await relay.slots.reconcile()
    order = await submitted(relay)
    await relay.report(unheard=[(order["name"], "n7", "no route to the relay")])
    assert relay.row(order["allocation"]).cause == NEVER_JOINED, "it has been there all the time"
