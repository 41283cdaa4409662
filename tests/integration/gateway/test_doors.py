"""Who is let in, who is not, and that both sides can see why."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from edif_hpc.domain.request import RequestState
from edif_hpc.slurm.order import WorkerExit
from edif_hpc.testing.engine import saved
from edif_hpc.testing.gateway import World
from edif_hpc.testing.peer import Peer, until
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import KeyPair, LinkEvent


def refusals(caplog: pytest.LogCaptureFixture, event: str) -> list[logging.LogRecord]:
    return [each for each in caplog.records if getattr(each, "event", "") == event]


async def serves(world: World) -> None:
    """The relay still does its work."""
    request = await world.relay.accept()
    worker = await world.worker(auto=lambda _: saved(b"r"))
    assert (await world.relay.ended(request)).state is RequestState.COMPLETED
    worker.runtime.drain("the test is over")
    assert await worker.exit is WorkerExit.DRAINED


async def test_an_unknown_key_is_refused_and_both_sides_see_it(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = await world.peer(KeyPair.generate())
    stranger.say(m.Hello(versions=[1], nonce="n"))
    await until(lambda: LinkEvent.REFUSED in stranger.events, "the peer sees the refusal")
    await until(lambda: world.relay.router.refusals == 1, "the relay counts the refusal")
    (record,) = refusals(caplog, "handshake_failed")
    assert getattr(record, "kind", "") == "refused"
    assert stranger.heard == []
    await serves(world)


async def test_a_worker_whose_key_is_revoked_ends_and_says_why(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    worker = await world.worker()
    await world.relay.core.fleet.end(worker.allocation, cause="test")
    assert await worker.exit is WorkerExit.REFUSED
    assert "this key was revoked" in caplog.text


async def test_a_revoked_key_is_not_let_in_again(world: World) -> None:
    keys, pilot, allocation = await world.relay.join()
    peer = await world.peer(keys)
    await peer.greet()
    await world.relay.core.fleet.end(allocation, cause="test")
    peer.say(m.Renew())
    refused = await peer.hears(m.Refused)
    assert refused.code == "not_authenticated"
    again = await world.peer(keys)
    await until(lambda: LinkEvent.REFUSED in again.events, "the worker's key is refused")
    other = await world.peer(pilot)
    await until(lambda: LinkEvent.REFUSED in other.events, "the pilot's key is refused")


async def test_revoking_a_key_returns_its_leases(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    await world.relay.core.fleet.end(worker.allocation, cause="test")
    other = await world.worker()
    await world.runs(other, request)
    assert world.relay.ends(request) == ["expired", None]


async def test_a_wrong_server_key(world: World, caplog: pytest.LogCaptureFixture) -> None:
    keys, _, _ = await world.relay.join()
    peer = Peer()
    world.peers.append(peer)
    peer.dial(world.relay.router.endpoint, KeyPair.generate().public, keys)
    await until(
        lambda: LinkEvent.MISMATCH in peer.events, "the peer sees that it is not our relay"
    )
    await until(lambda: world.relay.router.refusals > 0, "the relay sees a failed handshake")
    assert getattr(refusals(caplog, "handshake_failed")[0], "kind", "") == "mismatch"
    assert LinkEvent.CONNECTED not in peer.events
    await serves(world)


@pytest.fixture
async def dealer(world: World) -> AsyncIterator[zmq.asyncio.Socket]:
    """A socket without our door around it."""
    context = zmq.asyncio.Context()
    yield context.socket(zmq.DEALER)
    context.destroy(linger=0)


def curve(socket: zmq.asyncio.Socket, world: World, keys: KeyPair) -> None:
    socket.curve_serverkey = world.relay.keys.public.encode()
    socket.curve_publickey = keys.public.encode()
    socket.curve_secretkey = keys.secret.encode()


async def test_a_peer_without_encryption(world: World, dealer: zmq.asyncio.Socket) -> None:
    dealer.connect(world.relay.router.endpoint)
    await dealer.send(codec.encode(m.Hello(versions=[1], nonce="n")))
    await until(lambda: world.relay.router.refusals > 0, "the relay sees a failed handshake")
    assert world.relay.core.fleet.workers == {}


async def test_a_peer_that_names_itself_is_not_heard(
    world: World, dealer: zmq.asyncio.Socket, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever could choose a routing id could take another's messages."""
    victim = await world.worker()
    route = world.relay.core.gateway._links[victim.key].route
    assert route[:1] == b"\0", "the ROUTER made it"
    keys, _, _ = await world.relay.join()
    curve(dealer, world, keys)
    dealer.routing_id = b"mine" + route
    dealer.connect(world.relay.router.endpoint)
    await dealer.send(codec.encode(m.Hello(versions=[1], nonce="n")))
    await until(lambda: refusals(caplog, "wire_dropped"), "its message is dropped")
    assert keys.public not in world.relay.core.fleet.workers
    request = await world.relay.accept()
    await world.runs(victim, request)


async def test_a_message_of_several_frames_is_dropped(
    world: World, dealer: zmq.asyncio.Socket, caplog: pytest.LogCaptureFixture
) -> None:
    keys, _, _ = await world.relay.join()
    curve(dealer, world, keys)
    dealer.connect(world.relay.router.endpoint)
    hello = codec.encode(m.Hello(versions=[1], nonce="n"))
    await dealer.send_multipart([hello, hello])
    await until(lambda: refusals(caplog, "wire_dropped"), "it is dropped")
    assert world.relay.core.fleet.workers == {}


async def test_an_oversized_frame_costs_its_sender_the_connection(
    world: World, dealer: zmq.asyncio.Socket
) -> None:
    keys, _, _ = await world.relay.join()
    curve(dealer, world, keys)
    monitor = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    dealer.connect(world.relay.router.endpoint)
    await dealer.send(b"x" * (codec.MAX_PEER_FRAME_BYTES + 100_000))
    assert await monitor.poll(20_000), "it is not cut off"
    dealer.disable_monitor()
    monitor.close()
    await serves(world)


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x80", b"\x81\xa1t\xa6hello!"])
async def test_garbage_is_answered_and_harms_nobody(world: World, frame: bytes) -> None:
    peer = await world.peer()
    await peer.greet(window=0)
    peer.say_bytes(frame)
    refused = await peer.hears(m.Refused)
    assert refused.code == "remote_protocol"
    peer.say(m.Renew())
    await peer.hears(m.Beat)
    await serves(world)


async def test_versions_that_do_not_meet(world: World) -> None:
    peer = await world.peer()
    peer.say(m.Hello(versions=[99], nonce="n"))
    refused = await peer.hears(m.Refused)
    assert refused.code == "protocol"
    assert "[99]" in refused.detail
    assert "matching versions" in refused.detail
    assert world.relay.core.fleet.workers == {}


async def test_a_pilot_that_sends_a_done(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    pilot = await world.peer(worker.pilot)
    pilot.say(m.Hello(versions=[1], nonce="p"))
    await pilot.hears(m.Welcome)
    pilot.say(m.Done(request=request, attempt=1, inline=b"forged"))
    refused = await pilot.hears(m.Refused)
    assert refused.code == "remote_protocol"
    assert "a pilot may not send Done" in refused.detail
    assert world.relay.ends(request) == [None]
    worker.engine.end(request, saved(b"true"))
    await world.relay.ended(request)
    assert world.relay.disk.inline_result(request) == b"true"


async def test_another_workers_lease_cannot_be_answered(world: World) -> None:
    worker = await world.worker()
    request = await world.relay.accept()
    await world.runs(worker, request)
    thief = await world.peer()
    await thief.greet()
    for message in (
        m.Started(request=request, attempt=1),
        m.Renew(held=[m.Held(request=request, attempt=1)]),
        m.Return(request=request, attempt=1, reason="released"),
        m.Log(request=request, attempt=1, text="forged"),
        m.Need(request=request, attempt=1, first=1, count=1),
        m.Done(request=request, attempt=1, inline=b"forged"),
    ):
        thief.say(message)
    ack = await thief.hears(m.Ack)
    assert not ack.accepted
    await thief.hears(m.Abandon, nth=2)
    worker.engine.end(request, saved(b"true"))
    await world.relay.ended(request)
    assert world.relay.disk.inline_result(request) == b"true"
    assert not any(each.status == "LOG" for each in world.relay.told[request])


async def test_a_message_before_hello_asks_for_hello(world: World) -> None:
    peer = await world.peer()
    peer.say(m.Renew())
    assert (await peer.hears(m.Refused)).code == "unknown_session"
    await peer.greet()


async def test_the_older_connection_of_a_key_is_not_heard(world: World) -> None:
    keys, _, _ = await world.relay.join()
    old = await world.peer(keys)
    await old.greet(nonce="same")
    new = await world.peer(keys)
    await new.greet(nonce="same")
    old.say(m.Renew())
    assert (await old.hears(m.Refused)).code == "unknown_session"
    request = await world.relay.accept()
    assert (await new.hears(m.Grant)).request == request


async def test_a_join_whose_answer_was_lost_is_answered_again(world: World) -> None:
    fleet = world.relay.core.fleet
    (made,) = await fleet.allocate("tiny", site="local")
    keys = {"worker_key": "w" * 40, "pilot_key": "p" * 40, "node": "n1"}
    first = await fleet.join(made["join_token"], **keys)
    assert await fleet.join(made["join_token"], **keys) == first
