"""Leases on a real socket and a real disk: granted, renewed, lost, stolen, fenced."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from edif_hpc.domain.request import FailureKind, RequestState
from edif_hpc.testing.engine import failed, saved
from edif_hpc.testing.gateway import World
from edif_hpc.testing.peer import until
from edif_hpc.wire import messages as m

COMPLETED, ERROR, QUEUED = RequestState.COMPLETED, RequestState.ERROR, RequestState.QUEUED


def lease(grant: m.Grant) -> dict[str, Any]:
    return {"request": grant.request, "attempt": grant.attempt}


async def test_a_request_runs_and_its_result_is_stored(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept(blob=b"the blob")
    await world.runs(worker, request)
    assert worker.engine.blobs == [b"the blob"]
    worker.engine.end(request, saved(b"the result"))
    row = await world.relay.ended(request)
    assert row.state is COMPLETED
    assert world.relay.disk.inline_result(request) == b"the result"
    assert row.meta["commit"] == "c0ffee"
    assert row.meta["runtime"] >= 0
    assert row.meta["queued_s"] >= 0
    assert world.relay.ends(request) == ["completed"]
    statuses = [each.status for each in world.relay.told[request]]
    assert statuses[-1] == "COMPLETED"
    assert "RUNNING" in statuses


async def test_a_large_blob_is_fetched(world: World) -> None:
    worker = await world.worker(auto=lambda _: saved(b"r"))
    request = await world.relay.accept(blob=b"x" * 300_000)
    assert (await world.relay.ended(request)).state is COMPLETED
    assert worker.engine.blobs == [b"x" * 300_000]


async def test_a_lease_that_nobody_renews_is_given_to_another(world: World) -> None:
    silent = await world.peer()
    await silent.greet()
    request = await world.relay.accept()
    grant = await silent.hears(m.Grant)
    silent.say(m.Started(**lease(grant)))
    worker = await world.worker()
    await world.runs(worker, request)
    assert worker.engine.jobs[0].attempt == 2
    assert world.relay.ends(request) == ["expired", None]
    assert world.relay.row(request).crashes == 0, "nobody is blamed for a lost network"

    # The first one is back with its answer: it does not hold the lease any more.
    await silent.greet(held=[m.Held(**lease(grant), started=True)])
    welcome = await silent.hears(m.Welcome, nth=2)
    assert welcome.keep == []
    silent.say(m.Done(**lease(grant), inline=b"too late"))
    ack = await silent.hears(m.Ack)
    assert not ack.accepted
    assert "does not hold the lease" in ack.detail
    worker.engine.end(request, saved(b"in time"))
    await world.relay.ended(request)
    assert world.relay.disk.inline_result(request) == b"in time"


async def test_a_heartbeat_keeps_a_lease(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    leases = world.relay.core.leasing._leases
    first = leases._deadlines[request]
    await until(lambda: leases._deadlines[request] > first + 1, "the deadline moves")
    assert world.relay.ends(request) == [None]


async def test_a_done_that_is_repeated_is_acknowledged_again(world: World) -> None:
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    grant = await peer.hears(m.Grant)
    done = m.Done(**lease(grant), inline=b"result")
    peer.say(m.Started(**lease(grant)), done)
    assert (await peer.hears(m.Ack)).accepted
    peer.say(done)
    assert (await peer.hears(m.Ack, nth=2)).accepted
    assert len(world.relay.disk.charges()) == 1
    assert sum(each.final for each in world.relay.told[request]) == 1


async def test_a_grant_that_did_not_arrive_is_granted_again(world: World) -> None:
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    await peer.hears(m.Grant)  # and from here on it pretends that it did not
    for beat in range(1, 100):
        peer.say(m.Renew())
        await peer.hears(m.Beat, nth=beat)
        if world.relay.ends(request) != [None]:
            break
        await asyncio.sleep(0.05)
    again = await peer.hears(m.Grant, nth=2)
    assert again.attempt == 2
    assert world.relay.ends(request)[0] == "released"
    await peer.greet(held=[m.Held(request=request, attempt=1)])
    assert (await peer.hears(m.Welcome, nth=2)).keep == [], "the older attempt is over"


async def test_a_worker_that_cannot_be_reached_is_asked_once(world: World) -> None:
    """Its connection is gone, which shows at the next grant; the request waits for somebody else."""
    gone = await world.peer()
    await gone.greet()
    await gone.close()
    gateway = world.relay.core.gateway
    (route,) = [each.route for each in gateway._links.values()]
    await until(lambda: not world.relay.router.send(route, b""), "the relay's socket knows")
    request = await world.relay.accept()
    await until(lambda: not world.relay.core.fleet.workers, "it is not asked again")
    worker = await world.worker()
    await world.runs(worker, request)
    assert world.relay.ends(request) == ["released", None]


async def test_done_and_the_next_grant_share_a_commit(world: World) -> None:
    peer = await world.peer()
    await peer.greet()
    first = await world.relay.accept(listen=False)
    grant = await peer.hears(m.Grant)
    await world.relay.accept(listen=False)
    peer.say(m.Started(**lease(grant)))
    await until(
        lambda: world.relay.row(first).state is RequestState.RUNNING, "the start is stored"
    )
    before = world.relay.disk.commits
    peer.say(m.Done(**lease(grant), inline=b"result"))
    assert (await peer.hears(m.Ack)).accepted
    await peer.hears(m.Grant, nth=2)
    assert world.relay.disk.commits - before == 1


async def test_prefetch_and_steal(world: World) -> None:
    """A worker takes one ahead behind a short run; when that turns out long, an idle one gets it."""
    world.short_runs()
    busy = await world.worker()
    first, second = await world.relay.accept(), await world.relay.accept()
    await world.runs(busy, first)
    await until(lambda: world.relay.row(second).holder == busy.key, "the second is prefetched")
    idle = await world.worker()
    await world.runs(idle, second)
    assert world.relay.ends(second) == ["stolen", None]
    assert world.relay.row(second).crashes == 0
    assert busy.engine.running == [first]
    assert len(busy.engine.jobs) == 1
    for worker, request in ((busy, first), (idle, second)):
        worker.engine.end(request, saved(b"r"))
        assert (await world.relay.ended(request)).state is COMPLETED


async def test_nothing_is_prefetched_behind_a_run_of_unknown_length(world: World) -> None:
    worker = await world.worker()
    first, second = await world.relay.accept(), await world.relay.accept()
    await world.runs(worker, first)
    assert world.relay.row(second).state is QUEUED
    worker.engine.end(first, saved(b"r"))
    await world.runs(worker, second)


async def test_drain_finishes_what_runs_and_gives_the_rest_back(world: World) -> None:
    world.short_runs()
    worker = await world.worker()
    first, second = await world.relay.accept(), await world.relay.accept()
    await world.runs(worker, first)
    await until(lambda: world.relay.row(second).holder == worker.key, "the second is prefetched")
    assert await world.relay.core.fleet.drain(None, worker.allocation) == 1
    await until(lambda: world.relay.ends(second) == ["drained"], "the second is given back")
    assert world.relay.row(second).state is QUEUED
    worker.engine.end(first, saved(b"r"))
    assert (await world.relay.ended(first)).state is COMPLETED
    assert await worker.exit == 0
    await until(lambda: not world.relay.core.fleet.workers, "the worker has left")
    successor = await world.worker()
    await world.runs(successor, second)


async def test_an_order_to_drain_outlives_the_relay(world: World) -> None:
    """The order is a row: a worker that missed it hears it with its next Welcome."""
    keys, _, allocation = await world.relay.join()
    peer = await world.peer(keys)
    await peer.greet()
    assert not (await peer.hears(m.Welcome)).drain
    await world.relay.core.fleet.drain(None, allocation)
    await peer.hears(m.Drain)  # and from here on it pretends that it did not
    await world.relay.restart()
    await peer.greet()
    assert (await peer.hears(m.Welcome, nth=2)).drain


async def test_cancel_kills_the_run_and_frees_its_seat(world: World) -> None:
    worker = await world.worker()
    first, second = await world.relay.accept(), await world.relay.accept()
    await world.runs(worker, first)
    await world.relay.core.broker.cancel(first, by="ada")
    row = await world.relay.ended(first)
    assert row.failure is not None
    assert row.failure.kind is FailureKind.CANCELLED
    await world.runs(worker, second)
    assert worker.engine.killed == [first]
    assert world.relay.ends(first) == ["cancelled"]


async def test_a_killed_executor_holds_its_seat_until_it_is_gone(world: World) -> None:
    worker = await world.worker()
    first, second = await world.relay.accept(), await world.relay.accept()
    await world.runs(worker, first)
    worker.engine.reaped.clear()
    await world.relay.core.broker.cancel(first, by="ada")
    await until(lambda: worker.engine.killed == [first], "the run is killed")
    assert len(worker.engine.jobs) == 1
    worker.engine.reaped.set()
    await world.runs(worker, second)


@pytest.mark.parametrize("kind", [FailureKind.CRASH, FailureKind.OOM])
async def test_a_crash_is_tried_again_within_the_budget(world: World, kind: FailureKind) -> None:
    worker = await world.worker(auto=lambda _: failed(kind, "SIGSEGV"))
    request = await world.relay.accept()
    row = await world.relay.ended(request)
    assert row.state is ERROR
    assert row.failure is not None
    assert row.failure.kind is kind
    assert row.failure.details["cause"] == "SIGSEGV"
    assert len(worker.engine.jobs) == 3
    assert row.crashes == 3


async def test_an_error_of_the_code_is_final(world: World) -> None:
    worker = await world.worker(auto=lambda _: failed(FailureKind.USER, "ZeroDivisionError"))
    row = await world.relay.ended(await world.relay.accept())
    assert row.failure is not None
    assert (row.failure.kind, row.failure.message) == (FailureKind.USER, "ZeroDivisionError")
    assert len(worker.engine.jobs) == 1


async def test_what_a_run_prints_reaches_its_client(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    worker.engine.say(request, "hello\n")
    worker.engine.say(request, "ü" * 40_000)
    worker.engine.end(request, saved(b"r"))
    await world.relay.ended(request)
    await until(lambda: world.relay.told[request][-1].final, "the end is told")
    told = world.relay.told[request]
    logs = [each.description for each in told if each.status == "LOG"]
    assert "".join(logs) == "hello\n" + "ü" * 40_000
    assert told[-1].data == b"r"


async def test_a_burst_of_one_user_does_not_starve_another(world: World) -> None:
    order: list[str] = []
    burst = [await world.relay.accept(owner="ada") for _ in range(100)]
    mine = await world.relay.accept(owner="bob")

    def run(job: Any) -> Any:
        order.append(job.request_id)
        return saved(b"r")

    await world.worker(auto=run)
    for request in [*burst, mine]:
        assert (await world.relay.ended(request)).state is COMPLETED
    assert order.index(mine) <= 2
    assert [each for each in order if each != mine] == burst, "and its own order is kept"


async def test_positions_are_told(world: World) -> None:
    worker = await world.worker()
    running = await world.relay.accept()
    await world.runs(worker, running)
    waiting = [await world.relay.accept() for _ in range(3)]

    def last() -> str:
        told = world.relay.told[waiting[-1]]
        return f"{told[-1].status}: {told[-1].description}" if told else ""

    alone = "behind 3 requests of yours; start unknown, no run has ended yet"
    await until(lambda: last() == f"QUEUED: place 3, {alone}", "its place is told")
    worker.engine.end(running, saved(b"r"))
    await world.runs(worker, waiting[0])
    known = ("QUEUED: place 2, about ", " ahead of you: 2 requests of yours")
    await until(
        lambda: last().startswith(known[0]) and last().endswith(known[1]),
        "the queue moves up, and a run is known",
    )
