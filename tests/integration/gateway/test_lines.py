"""The one line that a client sees, through a real relay and real workers: it says what happens, and is never silent."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.relay.board import TELL_S
from edif_hpc.testing.engine import saved
from edif_hpc.testing.gateway import World
from edif_hpc.testing.peer import Peer, until
from edif_hpc.wire import messages as m

pytestmark = pytest.mark.anyio


def last(world: World, request: str) -> str:
    told = world.relay.told[request]
    return f"{told[-1].status}: {told[-1].description}" if told else ""


def polled(world: World, request: str) -> str:
    """What a poll says; a client's socket hears it up to `TELL_S` later, which is this world's lease."""
    board = world.relay.core.board
    return board.update(board.open[request].request).description


def lease(grant: m.Grant) -> dict[str, object]:
    return {"request": grant.request, "attempt": grant.attempt}


async def granted(world: World) -> tuple[Peer, m.Grant]:
    """A bare worker with a lease of a request that has begun."""
    peer = await world.peer()
    await peer.greet()
    await world.relay.accept()
    grant = await peer.hears(m.Grant)
    peer.say(m.Started(**lease(grant)))
    return peer, grant


async def test_a_model_that_loads_says_how_far_it_is(world: World) -> None:
    request = await world.relay.accept()
    nothing = "PROVISIONING: no worker is ordered"
    await until(lambda: last(world, request).startswith(nothing), "there is nothing yet")
    worker = await world.worker(loading=True)
    half = "DEPLOYING: the worker prepares (weights): 1 B of 2 B (50%), "
    await until(lambda: last(world, request).startswith(half), "how far it is")
    worker.engine.loaded.set()
    await world.runs(worker, request)
    assert "of about" not in last(world, request), "nothing was loaded before"
    other = await world.relay.accept()
    await world.relay.core.fleet.drain(None, worker.allocation)
    worker.engine.end(request, saved(b"r"))
    await worker.exit
    await world.worker(loading=True)
    await until(lambda: " of about " in last(world, other), "what the last load took is known")


async def test_an_old_worker_presents_its_load_to_a_new_relay(world: World) -> None:
    await world.worker(loading=True)
    await world.relay.restart()
    request = await world.relay.accept()
    await until(lambda: "(50%)" in last(world, request), "the new relay has heard it")


async def test_a_run_that_lasts_is_told_again(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    began, times = time.monotonic(), [time.monotonic()]

    def lasted() -> bool:
        if len(world.relay.told[request]) > len(times):
            times.append(time.monotonic())
        return time.monotonic() - began > 2.5 * TELL_S

    await until(lasted, "a while")
    assert max(later - sooner for sooner, later in pairwise([*times, time.monotonic()])) < 5.0
    assert last(world, request).startswith("RUNNING: runs on tiny/0 (n1) for ")
    assert "at most 59 min more" in last(world, request)


async def test_nobody_listens_and_nothing_is_composed(world: World) -> None:
    """Neither is the queue walked: the beat costs a look at those who listen, and here is none."""
    for _ in range(3):
        await world.relay.accept(listen=False)
    board = world.relay.core.board
    assert board._listening == {}
    board.queues["tiny"].order = None  # type: ignore[assignment, method-assign] # whoever walks it falls
    board.tell()


async def test_a_worker_that_falls_silent(world: World) -> None:
    _, grant = await granted(world)
    await until(lambda: last(world, grant.request).startswith("RUNNING: runs on"), "it runs")
    silent = "the worker has not been heard for"
    await until(lambda: silent in polled(world, grant.request), "its silence is told")
    assert "its lease ends in" in polled(world, grant.request)


async def test_a_lost_attempt_is_told_with_its_reason(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await until(lambda: world.relay.core.board.open[request].begun == 1, "the relay heard of it")
    world.relay.core.leasing.gone(worker.key, LeaseEnd.WORKER_LOST, {"cause": "exit code 9"})
    await until(lambda: "attempt 2 (the worker on n1 was lost)" in last(world, request), "why")
    told = await world.relay.core.broker.explain(request)
    assert [each["how"] for each in told["attempts"]] == [
        "the worker on n1 was lost: exit code 9",
        "",
    ]
    assert told["why"].startswith("runs on tiny/0 (n1) for ")
    assert told["why"].endswith("; attempt 2 (the worker on n1 was lost)")
    await world.relay.restart()
    again = world.relay.core.board.open[request].again
    assert again == "the worker was lost", "a new relay knows it from the rows"


async def test_a_result_that_goes_up(world: World) -> None:
    peer, grant = await granted(world)
    held = m.Held(request=grant.request, attempt=1, started=True, sent=1 << 20, size=4 << 20)
    peer.say(m.Renew(held=[held]))
    await until(lambda: "1.0 MiB of 4.0 MiB (25%)" in polled(world, grant.request), "how much")


async def test_a_worker_that_returns_everything_is_left_alone_for_longer_and_longer(
    world: World,
) -> None:
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    for nth in (1, 2, 3):
        grant = await peer.hears(m.Grant, nth=nth)
        peer.say(m.Return(**lease(grant), reason="released", evidence={"cause": "no scratch"}))
    fleet = world.relay.core.fleet
    (worker,) = fleet.workers.values()
    await until(lambda: worker.pause.returns == 3, "the third return is there")
    [line] = [each for each in fleet.processes() if each["worker"]]
    assert 0 < line["worker"]["paused_s"] <= 2.0
    assert "gave 3 lease(s) back in a row" in line["detail"]
    paused = "next; the worker gave requests back and pauses for"
    await until(lambda: last(world, request).startswith(f"QUEUED: {paused}"), "it is told")
    grant = await peer.hears(m.Grant, nth=4)
    peer.say(m.Started(**lease(grant)), m.Done(**lease(grant), inline=b"r"))
    await world.relay.ended(request)
    assert worker.pause.returns == 0


async def test_another_worker_gets_what_one_gave_back(world: World) -> None:
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    grant = await peer.hears(m.Grant)
    healthy = await world.worker()
    peer.say(m.Return(**lease(grant), reason="released"))
    await world.runs(healthy, request)
    assert sum(isinstance(each, m.Grant) for each in peer.heard) == 1
