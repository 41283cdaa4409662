"""What breaks: the disk, the relay, the worker's process, the network. Nothing is lost, nothing doubled."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.domain.request import RequestState
from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import FailpointReached
from edif_hpc.testing.engine import saved, saved_file
from edif_hpc.testing.gateway import LEASE_S, PART_BYTES, Relay, World, a_world
from edif_hpc.testing.peer import until
from edif_hpc.wire import messages as m

COMPLETED, QUEUED = RequestState.COMPLETED, RequestState.QUEUED


def lease(grant: m.Grant) -> dict[str, Any]:
    return {"request": grant.request, "attempt": grant.attempt}


# -- commits that fail ---------------------------------------------------------------------------


async def test_a_full_disk_accepts_nothing(world: World) -> None:
    world.relay.disk.full = True
    with pytest.raises(StoreUnavailable, match="disk is full"):
        await world.relay.accept()
    assert world.relay.core.board.open == {}
    world.relay.disk.full = False
    request = await world.relay.accept()
    await world.worker(auto=lambda _: saved(b"r"))
    assert (await world.relay.ended(request)).state is COMPLETED


async def test_a_lease_that_is_not_committed_is_not_granted(world: World) -> None:
    request = await world.relay.accept()
    peer = await world.peer()
    world.relay.disk.full = True
    await peer.greet()
    peer.say(m.Renew())
    await peer.hears(m.Beat)
    assert not any(isinstance(each, m.Grant) for each in peer.heard)
    assert world.relay.row(request).state is QUEUED
    world.relay.disk.full = False
    grant = await peer.hears(m.Grant)
    assert lease(grant) == {"request": request, "attempt": 1}


async def test_a_result_that_is_not_committed_is_not_acknowledged(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    world.relay.disk.full = True
    worker.engine.end(request, saved(b"r"))
    await until(lambda: not worker.engine.running, "the run is over")
    link = world.relay.core.gateway._links[worker.key]
    heard = link.session.heard_at
    await until(lambda: link.session.heard_at > heard + 1, "heartbeats pass")
    assert not any(each.final for each in world.relay.told[request])
    assert world.relay.ends(request) == [None]
    world.relay.disk.full = False
    row = await world.relay.ended(request)
    assert row.state is COMPLETED
    assert "queued_s" in row.meta, "and nothing of it was forgotten"
    assert len(worker.engine.jobs) == 1, "it is presented again, not run again"
    assert len(world.relay.disk.charges()) == 1


async def test_a_result_that_is_cancelled_before_it_is_stored_leaves_its_seat(
    world: World,
) -> None:
    """The worker forgets it at once, and has nothing to give back: its heartbeat says so."""
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    grant = await peer.hears(m.Grant)
    world.relay.disk.full = True
    peer.say(m.Started(**lease(grant)), m.Done(**lease(grant), inline=b"r"), m.Renew())
    await peer.hears(m.Beat)
    await until(lambda: not world.relay.core.board.open[request].busy, "the commit fails")
    world.relay.disk.full = False
    await world.relay.core.broker.cancel(request, by="ada")
    await peer.hears(m.Cancel)
    following = await world.relay.accept()
    peer.say(m.Renew())
    assert (await peer.hears(m.Grant, nth=2)).request == following


async def test_a_lease_whose_end_is_not_committed_ends_later(world: World) -> None:
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    grant = await peer.hears(m.Grant)
    world.relay.disk.full = True
    peer.say(m.Pull(window=0, executors=1))
    peer.say(m.Return(**lease(grant), reason="released"), m.Renew())
    await peer.hears(m.Beat)
    assert world.relay.ends(request) == [None]
    world.relay.disk.full = False
    worker = await world.worker()
    await world.runs(worker, request)
    assert world.relay.ends(request) == ["expired", None]


async def test_an_error_that_cannot_be_stored_ends_within_the_budget(world: World) -> None:
    """A `meta` that JSON cannot hold: refused by the store each time, so it must not be for ever."""
    peer = await world.peer()
    await peer.greet()
    request = await world.relay.accept()
    for attempt in (1, 2, 3):
        grant = await peer.hears(m.Grant, nth=attempt)
        done = m.Done(**lease(grant), inline=b"r", meta={"bytes": b"\xff"})
        peer.say(m.Started(**lease(grant)), done)
        ack = await peer.hears(m.Ack, nth=attempt)
        assert not ack.accepted
    row = await world.relay.ended(request)
    assert row.failure is not None
    assert row.failure.kind == "crash"
    assert "JSON" in row.failure.details["cause"]


@pytest.mark.parametrize(
    "failpoint",
    [
        "store.commit.before=raise@{n}",
        "store.commit.after=raise@{n}",
        "store.op.after=raise@{n}",
    ],
)
@pytest.mark.parametrize("moment", ["lease", "done"])
async def test_a_writer_that_dies(tmp_path: Path, failpoint: str, moment: str) -> None:
    """An unforeseen fault in the writer ends the relay; the next one carries on from the rows."""
    async with a_world(tmp_path) as world:
        relay = world.relay
        worker = await world.worker()
        request = await relay.accept() if moment == "done" else ""
        if request:
            await world.runs(worker, request)
        await relay.stop()
        relay.failpoints = failpoint.format(n=1 if moment == "done" else 2)
        await relay.start()
        if moment == "done":
            worker.engine.end(request, saved(b"r"))
        else:
            await until(lambda: worker.key in world.serving(), "the worker is back")
            request = "0" * 32
            with_fault = asyncio.create_task(relay.accept())
            await asyncio.wait({with_fault})
        assert isinstance(await relay.writer.died, FailpointReached)
        await relay.stop()
        relay.failpoints = ""
        await relay.start()
        if relay.disk.get(request) is None:
            return  # it was never accepted, and its client was told so
        await until(lambda: worker.engine.running or relay.row(request).terminal, "it goes on")
        if worker.engine.running:
            worker.engine.end(request, saved(b"r"))
        assert (await relay.ended(request)).state is COMPLETED
        assert len(relay.disk.charges()) == 1


# -- the relay goes away -------------------------------------------------------------------------


async def test_a_run_survives_a_restart_of_the_relay(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    await world.relay.restart()
    await until(lambda: worker.key in world.serving(), "the worker is back")
    assert world.relay.ends(request) == [None], "and has its lease"
    worker.engine.end(request, saved(b"r"))
    assert (await world.relay.ended(request)).state is COMPLETED
    assert len(worker.engine.jobs) == 1


async def test_a_result_that_was_ready_while_the_relay_was_away(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    await world.relay.stop()
    worker.engine.end(request, saved(b"r"))
    await until(lambda: not worker.engine.running, "the run is over")
    await world.relay.start()
    assert (await world.relay.ended(request)).state is COMPLETED
    assert len(worker.engine.jobs) == 1
    assert world.relay.disk.inline_result(request) == b"r"


async def test_a_lease_whose_worker_died_while_the_relay_was_away(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    await world.relay.stop()
    worker.exit.cancel()
    await asyncio.gather(worker.exit, return_exceptions=True)
    await world.relay.start()
    other = await world.worker()
    await world.runs(other, request)
    assert world.relay.ends(request) == ["expired", None]


async def test_a_stalled_relay_expires_no_lease(world: World) -> None:
    """Its own silence is nobody else's fault: here the whole process stands still."""
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    time.sleep(2 * LEASE_S)  # noqa: ASYNC251 - the loop is to be late
    heard = world.relay.core.gateway._links[worker.key].session.heard_at
    await until(
        lambda: world.relay.core.gateway._links[worker.key].session.heard_at > heard + 1,
        "heartbeats go on",
    )
    assert world.relay.ends(request) == [None]
    worker.engine.end(request, saved(b"r"))
    assert (await world.relay.ended(request)).state is COMPLETED


# -- uploads -------------------------------------------------------------------------------------


def result_file(world: World, size: int) -> Path:
    path = world.scratch / "result"
    path.write_bytes(bytes(range(256)) * (size // 256))
    return path


async def test_a_large_result_goes_up_in_parts(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    file = result_file(world, 5 * PART_BYTES + 512)
    expected = file.read_bytes()
    worker.engine.end(request, saved_file(file))
    row = await world.relay.ended(request)
    assert row.result is not None
    assert row.result.key == f"{request}/1"
    assert world.relay.objects.path(row.result.key).read_bytes() == expected
    await until(lambda: not file.exists(), "its file is gone")


async def test_an_upload_that_is_lost_is_put_again(world: World) -> None:
    """The relay comes back, but the parts that it was given do not."""
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    file = result_file(world, 5 * PART_BYTES)
    expected = file.read_bytes()
    world.relay.disk.full = True  # the parts go up, the end is not committed
    worker.engine.end(request, saved_file(file))
    await until((world.relay.root / "results" / "objects" / request).exists, "it was sealed")
    await world.relay.stop()
    for each in (world.relay.root / "results").rglob("*"):
        if each.is_file():
            each.unlink()
    await world.relay.start()
    row = await world.relay.ended(request)
    assert row.state is COMPLETED
    assert row.result is not None
    assert world.relay.objects.path(row.result.key or "").read_bytes() == expected
    assert len(worker.engine.jobs) == 1


async def test_a_sealed_upload_is_found_after_a_restart(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    file = result_file(world, 3 * PART_BYTES)
    world.relay.disk.full = True
    worker.engine.end(request, saved_file(file))
    await until((world.relay.root / "results" / "objects" / request).exists, "it was sealed")
    await world.relay.restart()
    assert (await world.relay.ended(request)).state is COMPLETED
    assert len(worker.engine.jobs) == 1


# -- the worker's process ------------------------------------------------------------------------


async def test_a_pilots_report_ends_leases_at_once(world: World) -> None:
    keys, pilot_keys, _ = await world.relay.join()
    dead = await world.peer(keys)
    await dead.greet(nonce="boot1")
    request = await world.relay.accept()
    grant = await dead.hears(m.Grant)
    dead.say(m.Started(**lease(grant)))
    await until(lambda: world.relay.row(request).state is RequestState.RUNNING, "it runs")
    pilot = await world.peer(pilot_keys)
    pilot.say(m.Hello(versions=[1], nonce="p"))
    pilot.say(m.Report(event="worker_exited", detail="killed by signal 9", nonce="boot0"))
    pilot.say(m.Renew())
    await pilot.hears(m.Beat)
    assert world.relay.ends(request) == [None], "an old report says nothing about this process"
    pilot.say(m.Report(event="worker_exited", detail="killed by signal 9", nonce="boot1"))
    await until(lambda: world.relay.ends(request) == ["worker_lost"], "the lease ends")
    assert world.relay.row(request).crashes == 1


async def test_a_new_process_of_a_worker_loses_the_leases_of_the_old(world: World) -> None:
    keys, _, _ = await world.relay.join()
    old = await world.peer(keys)
    await old.greet(nonce="boot1")
    request = await world.relay.accept()
    grant = await old.hears(m.Grant)
    old.say(m.Started(**lease(grant)))
    await until(lambda: world.relay.row(request).state is RequestState.RUNNING, "it runs")
    new = await world.peer(keys)
    await new.greet(nonce="boot2")
    again = await new.hears(m.Grant)
    assert lease(again) == {"request": request, "attempt": 2}
    assert world.relay.ends(request) == ["worker_lost", None]


async def test_a_lost_worker_is_no_fault_of_what_had_not_begun(world: World) -> None:
    keys, pilot_keys, _ = await world.relay.join()
    dead = await world.peer(keys)
    await dead.greet(nonce="boot1")
    request = await world.relay.accept()
    await dead.hears(m.Grant)
    pilot = await world.peer(pilot_keys)
    report = m.Report(event="worker_exited", detail="killed by signal 9", nonce="boot1")
    pilot.say(m.Hello(versions=[1], nonce="p"), report)
    await until(lambda: world.relay.ends(request) == ["released"], "the lease ends")
    assert world.relay.row(request).crashes == 0


async def test_two_lost_workers_quarantine_a_request(world: World) -> None:
    keys, _, _ = await world.relay.join()
    request = await world.relay.accept()
    for boot in (1, 2):
        peer = await world.peer(keys)
        await peer.greet(nonce=f"boot{boot}")
        grant = await peer.hears(m.Grant)
        peer.say(m.Started(**lease(grant)))
        await until(lambda: world.relay.row(request).state is RequestState.RUNNING, "it runs")
    last = await world.peer(keys)
    await last.greet(nonce="boot3")
    row = await world.relay.ended(request)
    assert row.failure is not None
    assert "quarantined" in row.failure.message


async def test_relays_do_not_share_anything(tmp_path: Path) -> None:
    """Two in one process: no module-level state."""
    relays = [Relay(root=tmp_path / name) for name in ("a", "b")]
    for relay in relays:
        relay.root.mkdir()
        await relay.start()
        await relay.deploy()
    await relays[0].accept()
    assert len(relays[0].core.board.open) == 1
    assert relays[1].core.board.open == {}
    for relay in relays:
        await relay.stop()
