"""Frames: what is sent arrives as it was; anything else is refused before it is used."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import suppress
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.errors import LocalProtocolError, RemoteProtocolError
from edif_hpc.worker.engine.messages import (
    FROM_EXECUTOR,
    FROM_ZYGOTE,
    TO_ZYGOTE,
    Broken,
    Done,
    Exited,
    Fork,
    Forked,
    Load,
    Log,
    Message,
    Ready,
    Written,
)
from edif_hpc.worker.engine.protocol import (
    FROM_EXECUTOR_BYTES,
    AsyncChannel,
    Channel,
    Decoder,
    PeerClosed,
    encode,
)

plain = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
).filter(lambda value: depth(value) <= 3)
metas = st.dictionaries(st.text(), plain, max_size=4)
messages = st.one_of(
    st.builds(Log, text=st.text()),
    st.builds(Written, size=st.integers(0, 2**60)),
    st.builds(Ready, steps=st.lists(st.text())),
    st.builds(Done, inline=st.none() | st.binary(), size=st.integers(0, 9), meta=metas),
    st.builds(
        Broken, kind=st.text(), message=st.text(), lacked_gradients=st.booleans(), meta=metas
    ),
)


def depth(value: Any) -> int:
    if isinstance(value, list):
        return 1 + max(map(depth, value), default=0)
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 0


def decoded(data: bytes, *, limit: int = FROM_EXECUTOR_BYTES) -> list[Message]:
    decoder = Decoder(FROM_EXECUTOR, limit)
    decoder.feed(data)
    found = []
    while (message := decoder.next()) is not None:
        found.append(message)
    return found


@given(st.lists(messages, max_size=4), st.integers(1, 40))
def test_what_is_sent_arrives_however_it_is_cut(sent: list[Message], piece: int) -> None:
    stream = b"".join(encode(message, FROM_EXECUTOR_BYTES) for message in sent)
    decoder = Decoder(FROM_EXECUTOR, FROM_EXECUTOR_BYTES)
    arrived = []
    for start in range(0, len(stream), piece):
        decoder.feed(stream[start : start + piece])
        while (message := decoder.next()) is not None:
            arrived.append(message)
    assert arrived == sent


@given(st.binary(min_size=4))
def test_bytes_from_nowhere_are_refused_or_wait(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        assert all(isinstance(message, FROM_EXECUTOR) for message in decoded(data))


@given(st.recursive(st.none() | st.integers() | st.text() | st.binary(), st.lists))
def test_a_frame_of_any_value_is_refused(value: Any) -> None:
    try:
        payload = msgpack.packb(value)
    except OverflowError:
        return
    with pytest.raises(RemoteProtocolError):
        decoded(struct.pack(">I", len(payload)) + payload)


def test_a_length_above_the_limit_is_refused_before_the_bytes_come() -> None:
    with pytest.raises(RemoteProtocolError, match="4294967295 bytes, above the limit"):
        decoded(b"\xff\xff\xff\xff")


def test_too_much_is_not_sent() -> None:
    with pytest.raises(LocalProtocolError, match="above the limit of 100"):
        encode(Log(text="x" * 200), 100)


def pair() -> tuple[socket.socket, Channel]:
    ours, theirs = socket.socketpair()
    return ours, Channel(theirs, accepts=TO_ZYGOTE, send_limit=1 << 20)


async def test_descriptors_stay_with_their_message() -> None:
    """An `Exited` without one and a `Forked` with one may arrive in a single read."""
    ours, channel = pair()
    listener = AsyncChannel(ours, accepts=FROM_ZYGOTE, receive_limit=1 << 20, max_fds=1)
    read, write = os.pipe()
    exited = Exited(executor=1, status=0, cpu_s=0.5, peak_rss_bytes=7)
    channel.send(exited)
    channel.send(Forked(executor=2, pid=3), [write])
    channel.send(exited)
    os.close(write)
    assert await listener.receive() == (exited, [])
    message, fds = await listener.receive()
    assert message == Forked(executor=2, pid=3)
    os.write(fds[0], b"through")
    os.close(fds[0])
    assert os.read(read, 20) == b"through"
    os.close(read)
    assert await listener.receive() == (exited, [])
    listener.close()
    channel.close()


async def test_large_orders_sent_at_once_do_not_mix() -> None:
    """Each is larger than the socket takes at a time, so every sender has to wait in the middle."""
    ours, channel = pair()
    orderer = AsyncChannel(ours, accepts=FROM_ZYGOTE, receive_limit=1 << 20)
    load = Load(
        model_key="k" * 1_000_000, more_tasks=[], folder="/", commit=None, adapters={}, dtype="auto", device="cpu", threads=1,
        scratch="/", ceiling="full", floor="full",
    )  # fmt: skip
    orders: list[Message] = [
        load,
        Fork(executor=1, rehearse=True),
        load,
        Fork(executor=2, rehearse=False),
        load,
    ]
    fds = [os.dup(0), os.dup(0)]

    def receive_all() -> list[tuple[Message, int]]:
        arrived = []
        for _ in orders:
            message, taken = channel.receive()
            arrived.append((message, len(taken)))
            for fd in taken:
                os.close(fd)
        return arrived

    receiving = asyncio.create_task(asyncio.to_thread(receive_all))
    await asyncio.gather(
        *(orderer.send(order, fds if isinstance(order, Fork) else ()) for order in orders)
    )
    assert await receiving == [(order, 2 if isinstance(order, Fork) else 0) for order in orders]
    for fd in fds:
        os.close(fd)
    orderer.close()
    with pytest.raises(PeerClosed):
        channel.receive()
    channel.close()


async def test_a_message_without_its_descriptors_is_refused() -> None:
    ours, channel = pair()
    listener = AsyncChannel(ours, accepts=FROM_ZYGOTE, receive_limit=1 << 20, max_fds=1)
    channel.send(Forked(executor=2, pid=3))
    with pytest.raises(RemoteProtocolError, match="0 descriptors"):
        await listener.receive()
    listener.close()
    channel.close()
