"""Frames: everything that may be said goes through, and nothing else does."""

from __future__ import annotations

import random
import string
import tracemalloc
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edif_hpc.errors import LocalProtocolError, RemoteProtocolError
from edif_hpc.testing.messages import ALL, FROM_PEER, FROM_RELAY, LEASE, name_of
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m

Decode = Callable[[bytes], m.Message]
BOTH: list[Decode] = [codec.decode_from_peer, codec.decode_from_relay]
DEEP = b"\x81\xa1x" + b"\x91" * 50_000 + b"\xc0"

ids = st.text(string.ascii_letters + string.digits, min_size=1, max_size=64)
attempts = st.integers(1, 1 << 31)
words = st.text(max_size=200)
held = st.builds(m.Held, request=ids, attempt=attempts, started=st.booleans())
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=40)
    | st.binary(max_size=40),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
facts = st.dictionaries(st.text(max_size=20), plain, max_size=4)
messages = st.one_of(
    st.builds(
        m.Hello,
        versions=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=8),
        nonce=ids,
        held=st.lists(held, max_size=5),
        state=words,
        facts=facts,
        left_s=st.none() | st.floats(0, 1e9),
        job=st.none() | words,
        restart=st.integers(0, 256),
    ),
    st.builds(
        m.State,
        state=words,
        detail=words,
        progress=st.none() | st.floats(0, 1),
        facts=facts,
    ),
    st.builds(m.Renew, held=st.lists(held, max_size=5), left_s=st.none() | st.floats(0, 1e9)),
    st.builds(m.Revive, may_submit=st.booleans()),
    st.builds(m.Ordered, allocation=ids, job_id=words, detail=words),
    st.builds(
        m.Order,
        allocation=st.none() | ids,
        name=words,
        join_token=words,
        slot=st.integers(0, 1 << 20),
        generation=st.integers(0, 1 << 31),
        gpu=st.none() | words,
        exclude=st.lists(words, max_size=5),
        begin_after_s=st.floats(0, 1e9),
        reason=st.text(max_size=300),
    ),
    st.builds(m.Log, request=ids, attempt=attempts, text=st.text(max_size=300)),
    st.builds(
        m.Done,
        request=ids,
        attempt=attempts,
        inline=st.binary(max_size=300),
        size=st.integers(0, 1 << 50),
        meta=facts,
    ),
    st.builds(
        m.Return,
        request=ids,
        attempt=attempts,
        reason=words,
        evidence=st.dictionaries(words, words, max_size=3),
    ),
    st.builds(
        m.Grant,
        request=ids,
        attempt=attempts,
        model_key=st.text(max_size=100),
        compress=st.booleans(),
        env=facts,
        limits=st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False), max_size=3),
        blob=st.none() | st.binary(max_size=200),
    ),
    st.sampled_from(ALL),
)


def pack(value: Any) -> bytes:
    return msgspec.msgpack.encode(value)


def mine(message: m.Message) -> Decode:
    return codec.decode_from_peer if isinstance(message, m.FromPeer) else codec.decode_from_relay


def other(message: m.Message) -> Decode:
    return codec.decode_from_relay if isinstance(message, m.FromPeer) else codec.decode_from_peer


def as_dict(message: m.Message) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.msgpack.decode(codec.encode(message))
    return found


def tried(decode: Decode, frame: bytes) -> None:
    """What comes of a frame is a message or `RemoteProtocolError`, never anything else."""
    try:
        found = decode(frame)
    except RemoteProtocolError:
        return
    assert isinstance(found, m.Message)


# -- what may be said ----------------------------------------------------------------------------


def test_the_samples_are_complete() -> None:
    assert {type(each) for each in FROM_PEER} == set(m.FromPeer.__args__)
    assert {type(each) for each in FROM_RELAY} == set(m.FromRelay.__args__)


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_a_message_round_trips(message: m.Message) -> None:
    assert mine(message)(codec.encode(message)) == message


@given(messages)
def test_any_message_round_trips(message: m.Message) -> None:
    assert mine(message)(codec.encode(message)) == message


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_a_message_is_refused_in_the_other_direction(message: m.Message) -> None:
    with pytest.raises(RemoteProtocolError, match="is not a message"):
        other(message)(codec.encode(message))


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_unknown_fields_are_ignored(message: m.Message) -> None:
    assert mine(message)(pack(as_dict(message) | {"newer": [1, {"x": None}]})) == message


# -- limits --------------------------------------------------------------------------------------

HELD_LIST = [["r", 1, False]] * (m.MAX_HELD + 1)
TOO_MUCH: list[tuple[type[m.Message], str, Any]] = [
    (m.Hello, "versions", []),
    (m.Hello, "versions", list(range(9))),
    (m.Hello, "nonce", ""),
    (m.Hello, "nonce", "n" * 65),
    (m.Hello, "held", HELD_LIST),
    (m.Hello, "held", [["", 1, False]]),
    (m.Hello, "held", [["r", 0, False]]),
    (m.Hello, "held", [["r"]]),
    (m.Hello, "state", "s" * 201),
    (m.Hello, "facts", {1: 2}),
    (m.State, "state", "s" * 201),
    (m.State, "detail", "s" * 201),
    (m.State, "progress", 1.01),
    (m.State, "progress", -0.01),
    (m.State, "progress", float("nan")),
    (m.Pull, "window", -1),
    (m.Pull, "window", 257),
    (m.Pull, "executors", 257),
    (m.Started, "request", ""),
    (m.Started, "request", "r" * 65),
    (m.Started, "attempt", 0),
    (m.Started, "attempt", (1 << 31) + 1),
    (m.Started, "attempt", 1.5),
    (m.Renew, "held", HELD_LIST),
    (m.Log, "text", "x" * ((64 << 10) + 1)),
    (m.Log, "text", b"bytes"),
    (m.Need, "first", 0),
    (m.Need, "first", 10_001),
    (m.Need, "count", 0),
    (m.Need, "count", 65),
    (m.Done, "size", -1),
    (m.Done, "size", (1 << 50) + 1),
    (m.Done, "inline", b"x" * ((1 << 20) + 1)),
    (m.Done, "inline", "text"),
    (m.Done, "parts", [[1, "e"]]),  # besides inline
    (m.Done, "error", "user"),  # besides inline
    (m.Done, "inline", None),  # nothing at all
    (m.Done, "message", "x" * ((64 << 10) + 1)),
    (m.Done, "meta", []),
    (m.Return, "reason", "x" * 201),
    (m.Return, "evidence", {"cause": "x" * 201}),
    (m.Return, "evidence", {"cause": 1}),
    (m.Report, "event", "x" * 201),
    (m.Report, "detail", "x" * ((64 << 10) + 1)),
    (m.Report, "nonce", "n" * 65),
    (m.Revive, "may_submit", 1),
    (m.Ordered, "allocation", ""),
    (m.Ordered, "refusal", "quota"),  # besides job_id
    (m.Ordered, "job_id", None),  # nothing at all
    (m.Order, "exclude", ["n"] * 1001),
    (m.Order, "walltime_min", -1),
    (m.Hello, "left_s", -1.0),
    (m.Renew, "left_s", float("inf")),
    (m.Goodbye, "cause", "x" * 201),
    (m.Welcome, "version", 0),
    (m.Welcome, "lease_s", -1.0),
    (m.Welcome, "heartbeat_s", float("nan")),
    (m.Welcome, "part_bytes", -1),
    (m.Welcome, "keep", HELD_LIST),
    (m.Refused, "code", "x" * 201),
    (m.Refused, "detail", "x" * ((64 << 10) + 1)),
    (m.Grant, "model_key", "x" * ((64 << 10) + 1)),
    (m.Grant, "compress", "yes"),
    (m.Grant, "limits", {"wall_s": "long"}),
    (m.Grant, "blob", "text"),
    (m.Grant, "blob_bytes", -1),
    (m.Parts, "first", 0),
    (m.Parts, "urls", ["u"] * 65),
    (m.Parts, "urls", ["x" * ((64 << 10) + 1)]),
    (m.Ack, "detail", "x" * 201),
    (m.Ack, "accepted", 1),
    (m.Cancel, "reason", "x" * 201),
    (m.Drain, "reason", "x" * 201),
]


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    TOO_MUCH,
    ids=[f"{k.__name__}-{f}-{n}" for n, (k, f, _) in enumerate(TOO_MUCH)],
)
def test_a_field_has_its_limits(kind: type[m.Message], field: str, value: Any) -> None:
    sample = next(each for each in ALL if type(each) is kind)
    frame = pack(as_dict(sample) | {field: value})
    with pytest.raises(RemoteProtocolError):
        mine(sample)(frame)


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_every_required_field_is_required(message: m.Message) -> None:
    required = [each.name for each in msgspec.structs.fields(message) if each.required]
    for name in required:
        rest = {key: value for key, value in as_dict(message).items() if key != name}
        with pytest.raises(RemoteProtocolError, match=f"`{name}`"):
            mine(message)(pack(rest))


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_every_field_has_its_type(message: m.Message) -> None:
    for name in as_dict(message):
        wrong = as_dict(message) | {name: msgspec.msgpack.Ext(7, b"x")}
        with pytest.raises(RemoteProtocolError):
            mine(message)(pack(wrong))


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_an_oversized_frame_is_refused_before_it_is_read(message: m.Message) -> None:
    limit = codec.MAX_PEER_FRAME_BYTES
    frame = pack(as_dict(message) | {"padding": b"x" * limit})
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        mine(message)(frame)
    garbage = b"\xc1" * (limit + 1)
    with pytest.raises(RemoteProtocolError, match="over the limit"):
        mine(message)(garbage)


def test_what_would_be_refused_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="a Goodbye cannot be sent"):
        codec.encode(m.Goodbye(cause="x" * 201))
    with pytest.raises(LocalProtocolError, match="over the limit"):
        codec.encode(m.Log(**LEASE, text="x" * (3 << 20)))
    with pytest.raises(LocalProtocolError, match="a Grant cannot be sent"):
        codec.encode(msgspec.structs.replace(FROM_RELAY[2], blob_sha256="x" * 201))
    with pytest.raises(ValueError, match="has 2"):
        m.Done(**LEASE, inline=b"", error="user")


# -- what is hostile -----------------------------------------------------------------------------


@pytest.mark.parametrize("decode", BOTH)
@given(st.binary(max_size=300))
@example(b"")
@example(b"\xc1")
@example(b"\x80")
@example(b"\x81\xa1t\xa4done")
@example(b"\xdf\xff\xff\xff\xff")
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xc6\xff\xff\xff\xff")
def test_random_bytes(decode: Decode, frame: bytes) -> None:
    tried(decode, frame)


@pytest.mark.parametrize("decode", BOTH)
@given(
    st.dictionaries(
        st.sampled_from(["t", "request", "attempt", "held", "meta", "facts", "inline", "urls"]),
        st.sampled_from(
            [None, True, -1, 0, 1, 2.5, "x", b"x", [], {}, [[]], "done", "hello", "grant"]
        ),
    )
)
def test_maps_of_wrong_things(decode: Decode, value: dict[str, Any]) -> None:
    tried(decode, pack(value))


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_mutated_frames(message: m.Message) -> None:
    good = codec.encode(message)
    chance = random.Random(name_of(message))
    for _ in range(400):
        frame = bytearray(good)
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(len(frame))
            match chance.randrange(3):
                case 0:
                    frame[place] = chance.randrange(256)
                case 1:
                    frame[place:place] = chance.randbytes(chance.randint(1, 5))
                case _:
                    del frame[place : place + chance.randint(1, 5)]
                    frame = frame or bytearray(b"\x00")
        for decode in BOTH:
            tried(decode, bytes(frame))
    for length in range(len(good)):
        with pytest.raises(RemoteProtocolError):
            mine(message)(good[:length])
    with pytest.raises(RemoteProtocolError):
        mine(message)(good + b"\xc0")


@pytest.mark.parametrize("message", ALL, ids=name_of)
@pytest.mark.parametrize("tag", ["", "Hello", "nothing", 7, None, ["hello"]])
def test_wrong_tags(message: m.Message, tag: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        mine(message)(pack(as_dict(message) | {"t": tag}))


@pytest.mark.parametrize("message", ALL, ids=name_of)
@pytest.mark.parametrize("where", ["unknown", "facts", "meta", "env", "deployment"])
def test_deep_nesting(message: m.Message, where: str) -> None:
    rest = {key: value for key, value in as_dict(message).items() if key != where}
    head = pack(rest | {where: None})  # the nil at its end becomes a tower of lists
    plain = isinstance(as_dict(message).get(where), str)  # there a list is refused at its door
    with pytest.raises(RemoteProtocolError, match="Expected `str`" if plain else "recursion"):
        mine(message)(head[:-1] + DEEP)


@pytest.mark.parametrize("message", ALL, ids=name_of)
def test_not_even_a_map(message: m.Message) -> None:
    for value in [None, 7, "hello", b"hello", [], [as_dict(message)], datetime.now(UTC)]:
        with pytest.raises(RemoteProtocolError):
            mine(message)(pack(value))


def test_memory_is_bounded() -> None:
    """The worst that a frame within the limit can hold is a list of empty maps, one a byte."""
    head = pack({"t": "hello", "versions": [1], "nonce": "n", "facts": {"x": []}})[:-1] + b"\xdd"
    count = codec.MAX_PEER_FRAME_BYTES - len(head) - 4
    frame = head + count.to_bytes(4, "big") + b"\x80" * count
    tracemalloc.start()
    try:
        assert isinstance(codec.decode_from_peer(frame), m.Hello)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 256 << 20
