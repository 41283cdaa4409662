"""Attacks on the relay's surface by strangers: each is made for real, over raw sockets, and has to bounce."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import resource
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
import websocket

from edif_hpc.relay.sessions import MAX_UNREAD_BYTES, Update
from edif_hpc.testing.wait import wait_until

if TYPE_CHECKING:
    from conftest import Relay

Start = Callable[..., "Relay"]
LONG_S = 60.0
KIB, MIB = 1 << 10, 1 << 20
MANY = 300
PING = b"GET /ping HTTP/1.1\r\nhost: x\r\n\r\n"


@contextlib.contextmanager
def dial(relay: Relay, *, buffer: int | None = None) -> Iterator[socket.socket]:
    """A raw connection; `buffer` makes it take little before it is read."""
    with socket.socket() as raw:
        if buffer is not None:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        raw.settimeout(LONG_S)
        raw.connect(("127.0.0.1", relay.server.port))
        yield raw


def rest(raw: socket.socket) -> bytes:
    """All that comes until the relay closes."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := raw.recv(65536):
            received += chunk
    return received


def trickle(raw: socket.socket, pieces: Iterator[bytes], every_s: float) -> bytes:
    """Send a piece each time that the relay has said nothing for so long; returns what it says in the end."""
    raw.settimeout(every_s)
    for piece in pieces:
        try:
            raw.sendall(piece)
            said = raw.recv(65536)
        except TimeoutError:
            continue
        except ConnectionError:
            return b""
        raw.settimeout(LONG_S)
        return said + rest(raw)
    raw.settimeout(LONG_S)
    return rest(raw)


def request_head(relay: Relay, *lines: str, token: str | None = None, length: int = 100) -> bytes:
    """The head of a request as nnsight sends it."""
    own = [
        "POST /request HTTP/1.1",
        "host: x",
        f"ndif-api-key: {relay.researcher if token is None else token}",
        "nnsight-version: 0.8.1",
        "content-type: multipart/form-data; boundary=B",
        f"content-length: {length}",
    ]
    return "\r\n".join([*own, *lines, "", ""]).encode()


def form(blob: bytes, key: str) -> bytes:
    envelope = json.dumps({"model_key": key}).encode()
    return (
        b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n'
        + envelope
        + b'\r\n--B\r\nContent-Disposition: form-data; name="blob"; filename="r"\r\n\r\n'
        + blob
        + b"\r\n--B--\r\n"
    )


def subscribe(relay: Relay, token: str | None = None) -> websocket.WebSocket:
    return websocket.create_connection(
        relay.url.replace("http", "ws") + "/subscribe",
        header={"ndif-api-key": relay.researcher if token is None else token},
        timeout=LONG_S,
    )


def emptied(relay: Relay) -> None:
    wait_until(lambda: relay.server.door.open == 0, LONG_S, "no connection is left")


# -- slow-loris ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "piece"),
    [(b"", b""), (b"GET /ping HTTP/1.1\r\nx: ", b"y"), (b"", b"\r\n"), (PING, b"\r\n")],
    ids=["silence", "byte by byte", "empty lines", "empty lines after a request"],
)
def test_a_head_has_a_deadline(start_relay: Start, first: bytes, piece: bytes) -> None:
    relay = start_relay(head_s=0.5)
    with dial(relay) as raw:
        raw.sendall(first)
        if first == PING:
            assert b"pong" in raw.recv(65536)
        said = trickle(raw, itertools.repeat(piece, MANY), 0.1)
    assert b"HTTP/1.1 408 Request Timeout" in said
    assert b'"code":"too_slow"' in said
    assert b"head_s" in said
    emptied(relay)


def test_a_trickling_body_is_cut_off_with_words(start_relay: Start) -> None:
    relay = start_relay(stall_s=0.5)
    with dial(relay) as raw:
        raw.sendall(request_head(relay, length=5 * MIB) + form(bytes(2 * MIB), "x")[:-20])
        wait_until(lambda: list(relay.blob_root.iterdir()), LONG_S, "the upload is on disk")
        said = trickle(raw, itertools.repeat(b"x", MANY), 0.1)
    assert said.startswith(b"HTTP/1.1 408 ")
    assert b"slowest_rate" in said
    wait_until(lambda: not list(relay.blob_root.iterdir()), LONG_S, "the temporary file is gone")
    emptied(relay)


def test_a_slow_body_that_moves_arrives(start_relay: Start) -> None:
    """Ten times as long as a body may stall, at thrice the slowest rate."""
    relay = start_relay(stall_s=0.5, slowest_rate=1000)
    body = form(os.urandom(14_000), relay.model_key)
    pieces = (body[at : at + 300] for at in range(0, len(body), 300))
    with dial(relay) as raw:
        raw.sendall(request_head(relay, "connection: close", length=len(body)))
        said = trickle(raw, pieces, 0.1)
    assert said.startswith(b"HTTP/1.1 200 "), said


def test_who_waits_for_an_answer_is_not_slow(start_relay: Start) -> None:
    relay = start_relay(head_s=0.2, stall_s=0.2, poll_hold_s=1.5)
    request_id = relay.post().json()["id"]
    with relay.client(relay.researcher) as client:
        polls = [client.get(f"/response/{request_id}") for _ in range(2)]
    assert [each.status_code for each in polls] == [200, 200]


def test_an_answer_that_is_not_taken_is_dropped(start_relay: Start) -> None:
    relay = start_relay(stall_s=0.5)
    request_id = relay.post().json()["id"]
    relay.broker.complete(request_id, bytes(48 * MIB), 48 * MIB)
    link = relay.link("GET", f"/results/{request_id}").removeprefix(relay.url)
    with dial(relay, buffer=4 * KIB) as raw:
        raw.sendall(f"GET {link} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        wait_until(lambda: relay.server.door.open == 1, LONG_S, "it is connected")
        emptied(relay)
        assert len(rest(raw)) < 48 * MIB


# -- heads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 413),
        (b"GET /ping HTTP/1.1\r\nx: " + b"a" * 300_000, 413),
        (b"GET /ping HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", 413),
        (b"GET /ping HTTP/1.1\r\n" + b"a: %s\r\n" % (b"b" * 1000) * 90 + b"\r\n", 413),
        (b"CONNECT 192.0.2.1:22 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nhost : x\r\n\r\n", 400),
        (b"GET /ping HTTP/1.1\r\nhost: x\r\n folded: y\r\n\r\n", 400),
        (b"POST /request HTTP/1.1\r\ncontent-length: 4\r\ncontent-length: 5\r\n\r\n", 400),
        (
            b"POST /request HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n",
            400,
        ),
        (b"POST /request HTTP/1.1\r\ntransfer-encoding: x, chunked, y\r\n\r\n", 400),
        (b"POST /request HTTP/1.1\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /request HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nnot hex\r\n", 400),
    ],
    ids=[
        "long target",
        "endless header",
        "many headers",
        "large head",
        "connect",
        "tls",
        "http2",
        "space before colon",
        "folded",
        "two lengths",
        "length and chunks",
        "unknown coding",
        "negative length",
        "no chunk",
    ],
)
def test_heads_that_no_honest_client_sends(relay: Relay, sent: bytes, status: int) -> None:
    """One refusal and an end: what follows is not taken for another request, as smugglers want it."""
    with dial(relay) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(sent)
            raw.sendall(b"GET /connected HTTP/1.1\r\nhost: x\r\n\r\n")
        said = rest(raw)
    assert said.count(b"HTTP/1.1 ") <= 1
    assert b"connected" not in said
    if said:  # a reset may overtake an answer that its client did not wait for
        assert int(said.split()[1]) in {status, 401}
        assert b"x-content-type-options: nosniff" in said
    emptied(relay)


def test_a_head_without_an_end(start_relay: Start) -> None:
    """It is refused for its size, long before its time is over."""
    relay = start_relay(head_s=600)
    with dial(relay) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"GET /ping HTTP/1.1\r\nx: " + b"a" * 300_000)
        rest(raw)
    with dial(relay) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"GET /" + b"a" * 300_000)
        rest(raw)
    emptied(relay)


def test_a_refused_head_is_told_why(relay: Relay) -> None:
    with dial(relay) as raw:
        raw.sendall(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        said = rest(raw)
    assert said.startswith(b"HTTP/1.1 413 ")
    assert b"the address has more than 4096 bytes" in said


# -- connections -----------------------------------------------------------------------------------


def test_connections_of_one_address_are_limited(start_relay: Start) -> None:
    relay = start_relay(max_connections_per_address=3, head_s=60)
    with contextlib.ExitStack() as open_:
        for _ in range(3):
            open_.enter_context(dial(relay))
        wait_until(lambda: relay.server.door.open == 3, LONG_S, "they are in")
        with dial(relay) as raw:
            said = rest(raw)
        assert said.startswith(b"HTTP/1.1 429 ")
        assert b"3 connections are open from your address (max_connections_per_address)" in said
        assert b"retry-after: 10" in said
    emptied(relay)
    assert relay.post().status_code == 200


def test_connections_in_all_are_limited(start_relay: Start) -> None:
    relay = start_relay(max_connections=2, head_s=60)
    with dial(relay), dial(relay), dial(relay) as raw:
        assert b"2 connections are open here" in rest(raw)
    emptied(relay)


def test_a_process_without_descriptors_goes_on(relay: Relay) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clients = [socket.socket() for _ in range(5)]
    fillers = []
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(each.fileno() for each in clients) + 1, hard)
        )
        with contextlib.suppress(OSError):
            while True:
                fillers.append(os.open(os.devnull, os.O_RDONLY))
        for each in clients:
            each.settimeout(LONG_S)
            each.connect(("127.0.0.1", relay.server.port))
            assert rest(each) == b"", "it is let go, not left hanging"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in fillers:
            os.close(descriptor)
        for each in clients:
            each.close()
    assert relay.post().status_code == 200


# -- WebSockets ------------------------------------------------------------------------------------


def upgrade(relay: Relay) -> bytes:
    """A whole handshake."""
    return (
        b"GET /subscribe HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"ndif-api-key: " + relay.researcher.encode() + b"\r\n\r\n"
    )


def flood(connection: websocket.WebSocket, send: Callable[[], object]) -> None:
    """Send until the relay cuts the connection, which it has to do."""

    def endlessly() -> None:
        for _ in range(100_000):
            send()

    with pytest.raises((OSError, websocket.WebSocketException)):
        endlessly()
    connection.shutdown()


def test_clients_have_nothing_to_say(relay: Relay) -> None:
    connection = subscribe(relay)
    connection.recv()
    for _ in range(20):
        connection.ping("a")
        connection.pong("b")
    update = Update(request_id="r", status="QUEUED", description="still here")
    [session] = relay.sessions._open.values()
    relay.loop.call_soon_threadsafe(session.push, update)
    assert "still here" in str(connection.recv())
    flood(connection, lambda: connection.ping("x" * 100))
    emptied(relay)


@pytest.mark.parametrize("size", [10, 3 * KIB, 10 * MIB])
def test_a_flood_of_messages(relay: Relay, size: int) -> None:
    connection = subscribe(relay)
    flood(connection, lambda: connection.send("x" * size))
    emptied(relay)
    wait_until(lambda: relay.broker.closed, LONG_S, "the session is closed")


def test_a_flood_before_the_handshake_is_answered(start_relay: Start) -> None:
    """The gate holds it for a second; until then nothing of it is kept."""
    relay = start_relay(subscribe_rate=1, patience_s=30)
    held = [subscribe(relay) for _ in range(10)]
    with dial(relay) as raw:
        raw.sendall(upgrade(relay))
        with contextlib.suppress(ConnectionError):
            raw.sendall(b"\x81\xfe" * 500_000)
        assert b"101" not in rest(raw)
    for each in held:
        each.shutdown()
    emptied(relay)


def test_who_never_reads_loses_the_connection_and_nothing_else(start_relay: Start) -> None:
    """The relay keeps a bounded number of bytes for it, and lets go of them."""
    relay = start_relay(stall_s=0.2)
    with dial(relay, buffer=4 * KIB) as raw:
        raw.sendall(upgrade(relay))
        wait_until(lambda: len(relay.sessions) == 1, LONG_S, "it listens")
        [session] = relay.sessions._open.values()
        update = Update(request_id="r", status="LOG", description="x" * MIB)

        def push() -> bool:
            relay.loop.call_soon_threadsafe(session.push, update)
            return session.closed

        wait_until(push, LONG_S, "it is given up")
        assert session._unread_bytes <= MAX_UNREAD_BYTES + 2 * MIB
        assert not session._waiting
        emptied(relay)
    assert [each.id for each in relay.broker.closed] == [session.id]


def test_sessions_of_one_token_are_limited(start_relay: Start) -> None:
    relay = start_relay(max_sessions_per_token=2)
    held = [subscribe(relay), subscribe(relay)]
    with pytest.raises(
        websocket.WebSocketBadStatusException, match="max_sessions_per_token"
    ) as caught:
        subscribe(relay)
    assert caught.value.status_code == 429
    subscribe(relay, relay.other).close()
    for each in held:
        each.close()
    emptied(relay)
    subscribe(relay).close()


@pytest.mark.parametrize(
    "line", ["sec-websocket-version: 12", "sec-websocket-key: short", "sec-websocket-key:"]
)
def test_half_a_handshake(relay: Relay, line: str) -> None:
    with dial(relay) as raw:
        raw.sendall(
            b"GET /subscribe HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            + line.encode()
            + b"\r\n\r\n"
        )
        said = rest(raw)
    assert said.startswith(b"HTTP/1.1 4")
    emptied(relay)


# -- rates -----------------------------------------------------------------------------------------


def test_requests_of_one_token_have_a_rate(start_relay: Start) -> None:
    relay = start_relay(request_rate=1, patience_s=0)
    assert {relay.post().status_code for _ in range(10)} == {200}
    refused = relay.post()
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many")
    assert refused.headers["retry-after"] == "1"
    assert "1 a second on average are allowed (request_rate)" in refused.json()["detail"]
    assert relay.post(token=relay.other).status_code == 200, "others do not pay for it"
    relay.clock.advance(1)
    assert relay.post().status_code == 200
    assert relay.post().status_code == 429


def test_a_burst_is_smoothed_before_it_is_refused(start_relay: Start) -> None:
    relay = start_relay(request_rate=2, patience_s=5)
    assert {relay.post().status_code for _ in range(22)} == {200}


def test_polls_are_slowed_and_never_refused(start_relay: Start) -> None:
    relay = start_relay(poll_rate=1, patience_s=0, poll_hold_s=0)
    request_id = relay.post().json()["id"]
    with relay.client(relay.researcher) as client:
        answers = {client.get(f"/response/{request_id}").status_code for _ in range(30)}
    assert answers == {200}


def test_strangers_of_one_address_have_a_rate_and_lock_nobody_out(start_relay: Start) -> None:
    relay = start_relay(call_rate=1, failed_login_rate=1, patience_s=0)
    with relay.client() as client:
        codes = [client.get("/status").status_code for _ in range(11)]
    assert codes == [200] * 10 + [429]
    wrong = "edif_" + "0" * 12 + "_guess"
    with relay.client(wrong) as client:
        codes = [client.get("/whoami").status_code for _ in range(11)]
        told = client.get("/whoami").json()
    assert codes == [401] * 10 + [429]
    assert "calls with a wrong API key from your address" in told["detail"]
    with relay.client(relay.researcher) as client:
        assert client.get("/whoami").status_code == 200
    assert relay.post().status_code == 200


def test_the_hubs_own_tokens_are_no_guesses(start_relay: Start) -> None:
    relay = start_relay(failed_login_rate=1, patience_s=0)
    with relay.client(authorization="Bearer hf_something") as client:
        assert {client.get("/hub/api/models/a/b").status_code for _ in range(30)} == {404}


@pytest.mark.parametrize("proxied", [True, False])
def test_an_address_cannot_be_made_up(start_relay: Start, *, proxied: bool) -> None:
    """Of the proxy's header only what the proxy itself has added counts; without a proxy, nothing of it."""
    relay = start_relay(call_rate=1, patience_s=0, behind_proxy=proxied)

    def look(*forwarded: str) -> int:
        told = [("x-forwarded-for", each) for each in forwarded]
        return httpx.get(f"{relay.url}/status", headers=told, timeout=LONG_S).status_code

    codes = [look(f"198.51.100.{each}, 192.0.2.1") for each in range(6)]
    codes += [look(f"198.51.100.{each}", "192.0.2.1:4711") for each in range(6)]
    assert codes == [200] * 10 + [429] * 2
    assert look("192.0.2.1, 192.0.2.2") == (200 if proxied else 429)


# -- what one person may put in -------------------------------------------------------------------


def test_open_requests_of_one_token_are_limited(start_relay: Start) -> None:
    relay = start_relay(max_open_requests=2)
    first = relay.post().json()["id"]
    assert relay.post().status_code == 200
    refused = relay.post()
    assert refused.status_code == 429
    assert "2 requests of your token have not ended yet (max_open_requests)" in refused.text
    assert relay.post(token=relay.other).status_code == 200
    relay.broker.complete(first, b"r", 1)
    assert relay.post().status_code == 200


def test_open_bytes_of_one_token_are_limited(start_relay: Start) -> None:
    relay = start_relay(max_open_bytes=3 * MIB)
    assert relay.post(blob=bytes(2 * MIB)).status_code == 200
    refused = relay.post(blob=bytes(2 * MIB))
    assert (refused.status_code, refused.json()["code"]) == (429, "too_many")
    assert "max_open_bytes" in refused.text
    assert relay.post(token=relay.other, blob=bytes(2 * MIB)).status_code == 200
    assert len(list(relay.blob_root.iterdir())) == 2


def test_bodies_under_way_of_one_token_are_limited(start_relay: Start) -> None:
    relay = start_relay(max_uploads_per_token=1)
    with dial(relay) as raw:
        raw.sendall(request_head(relay, length=5 * MIB) + form(bytes(2 * MIB), "x")[:-20])
        wait_until(lambda: list(relay.blob_root.iterdir()), LONG_S, "the upload is on disk")
        refused = relay.post()
        assert refused.status_code == 429
        assert "max_uploads_per_token" in refused.text
        assert relay.post(token=relay.other).status_code == 200
    wait_until(lambda: relay.post().status_code == 200, LONG_S, "its place is free again")


# -- what an answer gives away ---------------------------------------------------------------------


def test_unknown_and_wrong_tokens_get_the_same_bytes(relay: Relay) -> None:
    known = relay.researcher.rpartition("_")[0]
    answers = set()
    for token in (f"{known}_wrong", f"edif_{'0' * 12}_wrong"):
        with dial(relay) as raw:
            raw.sendall(
                f"GET /whoami HTTP/1.1\r\nhost: x\r\nndif-api-key: {token}\r\nconnection: close\r\n\r\n".encode()
            )
            lines = rest(raw).split(b"\r\n")
            answers.add(tuple(each for each in lines if not each.startswith(b"date:")))
    assert len(answers) == 1


def raw_answers(relay: Relay) -> Iterator[tuple[str, bytes]]:
    request_id = relay.post().json()["id"]
    relay.broker.complete(request_id, b"result", 6)
    result = relay.link("GET", f"/results/{request_id}").removeprefix(relay.url)
    upgrade = "upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    for name, target, more in (
        ("ping", "GET /ping", ""),
        ("status", "GET /status", ""),
        ("unknown", "GET /nothing", ""),
        ("method", "PUT /request", ""),
        ("unauthenticated", "POST /request", ""),
        ("no hub model", "GET /hub/api/models/a/b", ""),
        ("result", f"GET {result}", ""),
        ("forged", "GET /results/x?expires=1&sig=2", ""),
        ("operator", "GET /api/ps", ""),
        ("old client", "GET /ws/socket.io/", ""),
        ("no token", "GET /subscribe", upgrade),
        ("no such socket", "GET /nothing", upgrade),
        ("old socket", "GET /ws/socket.io/", upgrade),
        ("no handshake", "GET /subscribe", "upgrade: websocket\r\nconnection: upgrade\r\n"),
        ("nonsense", "nonsense", ""),
    ):
        closing = "" if "upgrade" in more else "connection: close\r\n"
        with dial(relay) as raw:
            raw.sendall(f"{target} HTTP/1.1\r\nhost: x\r\n{more}{closing}\r\n".encode())
            yield name, rest(raw)


def test_a_handshake_is_dressed_too(relay: Relay) -> None:
    said = b""
    with dial(relay) as raw:
        raw.sendall(upgrade(relay))
        while b"\r\n\r\n" not in said:
            said += raw.recv(65536)
    head = said.partition(b"\r\n\r\n")[0].lower()
    assert head.startswith(b"http/1.1 101 ")
    assert b"x-content-type-options: nosniff" in head
    assert b"server:" not in head


def test_every_answer_is_dressed_and_tells_nothing(relay: Relay) -> None:
    for name, said in raw_answers(relay):
        lines = said.partition(b"\r\n\r\n")[0].lower().decode().split("\r\n")
        told = dict(each.split(": ", 1) for each in lines[1:])
        assert told.get("x-content-type-options") == "nosniff", (name, said)
        assert told["x-frame-options"] == "deny", name
        assert told["referrer-policy"] == "no-referrer", name
        assert told["cache-control"] == "no-store", name
        assert "default-src 'none'" in told["content-security-policy"], name
        assert "server" not in told, name
        shown = " ".join([*told, *told.values()])
        assert not any(
            word in shown for word in ("uvicorn", "starlette", "python", "websockets")
        ), name
