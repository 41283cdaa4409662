"""Frames between worker, zygote and executors: 4 bytes of length, then one msgpack value.

An executor runs code that somebody else wrote, so whatever it sends is hostile. That is why nothing
here can carry an object: a frame is `[name, {field: value}]` with a known name, exactly the fields of
that message, and values of exactly the declared types. Bytes are passed on unopened. A length above
the limit of the direction, or anything else unexpected, raises `RemoteProtocolError`, and the caller
kills the peer. (`multiprocessing` pipes would unpickle, that is: run, what the peer sends.)

`Channel` is the blocking end, for zygote and executor. `AsyncChannel` is the worker's. Descriptors
travel beside a frame; an end accepts only as many as it was told to expect.
"""

from __future__ import annotations

import array
import asyncio
import dataclasses
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

from edif_hpc.errors import EdifError, LocalProtocolError, RemoteProtocolError
from edif_hpc.worker.engine.messages import Message, descriptors
from edif_hpc.worker.engine.values import INLINE_BYTES, MIB

HEADER_BYTES = 4
#: The largest frame by direction. From an executor: an inline result and its meta.
FROM_EXECUTOR_BYTES = INLINE_BYTES + 256 * 1024
FROM_ZYGOTE_BYTES = 4 * MIB
FROM_WORKER_BYTES = 4 * MIB
CHUNK_BYTES = 256 * 1024
META_DEPTH = 4


class PeerClosed(EdifError):
    """The other end is gone."""

    code = "peer_closed"


def _is_plain(value: object, depth: int = META_DEPTH) -> bool:
    if value is None or type(value) in {bool, int, float, str}:
        return True
    if depth == 0:
        return False
    if type(value) is list:
        return all(_is_plain(item, depth - 1) for item in value)
    return type(value) is dict and all(
        type(key) is str and _is_plain(item, depth - 1) for key, item in value.items()
    )


def _is_strings(value: object) -> bool:
    return type(value) is list and all(type(item) is str for item in value)


#: By annotation as written above: whether a value has that type. Exact types: `True` is no `int`.
_CHECKS: dict[str, Callable[[object], bool]] = {
    "str": lambda v: type(v) is str,
    "str | None": lambda v: v is None or type(v) is str,
    "bytes": lambda v: type(v) is bytes,
    "bytes | None": lambda v: v is None or type(v) is bytes,
    "bool": lambda v: type(v) is bool,
    "int": lambda v: type(v) is int and v >= 0,
    "float": lambda v: type(v) is float and v >= 0,
    "list[str]": _is_strings,
    "list[int]": lambda v: type(v) is list and all(type(i) is int and i >= 0 for i in v),
    "dict[str, str]": lambda v: type(v) is dict and _is_strings([*v, *v.values()]),
    "dict[str, float]": lambda v: (
        type(v) is dict
        and _is_strings([*v])
        and all(type(each) in {int, float} and each >= 0 for each in v.values())
    ),
    "dict[str, bytes]": lambda v: (
        type(v) is dict and _is_strings([*v]) and all(type(each) is bytes for each in v.values())
    ),
    "dict[str, Plain]": lambda v: type(v) is dict and _is_plain(v),
}


def encode(message: Message, limit: int) -> bytes:
    """Return the frame of `message`.

    Raises:
        LocalProtocolError: the frame is above `limit`.
    """
    fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
    payload: bytes = msgpack.packb([type(message).__name__, fields])
    if len(payload) > limit:
        raise LocalProtocolError(
            f"a {type(message).__name__} frame of {len(payload)} bytes is above the limit of {limit}"
        )
    return len(payload).to_bytes(HEADER_BYTES, "big") + payload


def decode(payload: bytes | bytearray, accepts: Sequence[type[Any]]) -> Message:
    """Return the message in `payload`, which must be one of `accepts`.

    Raises:
        RemoteProtocolError: it is anything else.
    """
    try:
        value = msgpack.unpackb(payload)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise RemoteProtocolError(f"a frame that is not msgpack: {error!r:.200}") from error
    if not (type(value) is list and len(value) == 2 and type(value[1]) is dict):
        raise RemoteProtocolError(f"a frame that is not [name, fields]: {value!r:.200}")
    name, given = value
    kind = next((kind for kind in accepts if kind.__name__ == name), None)
    if kind is None:
        raise RemoteProtocolError(f"a frame {name!r:.200} that this side does not take")
    declared = {f.name: str(f.type) for f in dataclasses.fields(kind)}
    if given.keys() != declared.keys():
        raise RemoteProtocolError(f"a {name} frame with the fields {sorted(given)!r:.200}")
    for field_name, annotation in declared.items():
        if not _CHECKS[annotation](given[field_name]):
            raise RemoteProtocolError(f"a {name} frame whose {field_name} is not {annotation}")
    message: Message = kind(**given)
    return message


class Decoder:
    """Cuts a stream of bytes into messages; knows nothing of sockets."""

    def __init__(self, accepts: Sequence[type[Any]], limit: int) -> None:
        self._accepts = accepts
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Take more bytes."""
        self._buffer += data

    def next(self) -> Message | None:
        """Return the next whole message, or `None` until more bytes are there.

        Raises:
            RemoteProtocolError: the length is above the limit, or the message is malformed.
        """
        if len(self._buffer) < HEADER_BYTES:
            return None
        length = int.from_bytes(self._buffer[:HEADER_BYTES], "big")
        if length > self._limit:
            raise RemoteProtocolError(
                f"a frame of {length} bytes, above the limit of {self._limit}"
            )
        end = HEADER_BYTES + length
        if len(self._buffer) < end:
            return None
        payload = bytes(memoryview(self._buffer)[HEADER_BYTES:end])
        del self._buffer[:end]
        return decode(payload, self._accepts)


def _receive(sock: socket.socket, max_fds: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """Read what is there; descriptors beyond `max_fds` are closed by the kernel."""
    space = socket.CMSG_SPACE(max_fds * array.array("i").itemsize) if max_fds else 0
    data, ancillary, _, _ = sock.recvmsg(CHUNK_BYTES, space, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    if not data:
        raise PeerClosed("the other end closed the socket")
    return data, list(fds)


def settle(future: asyncio.Future[None]) -> None:
    """Let `future` be done, if it is not yet: what a callback of the loop does to wake a task."""
    if not future.done():
        future.set_result(None)


def _take(fds: list[int], message: Message) -> list[int]:
    """Take from `fds` those that belong to `message`: reads may join frames, so they are counted."""
    count = descriptors(message)
    if len(fds) < count:
        raise RemoteProtocolError(f"a {type(message).__name__} frame with {len(fds)} descriptors")
    taken = fds[:count]
    del fds[:count]
    return taken


class Channel:
    """The blocking end of a socketpair."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        accepts: Sequence[type[Any]],
        send_limit: int,
        receive_limit: int = FROM_WORKER_BYTES,
        max_fds: int = 2,
    ) -> None:
        self._sock = sock
        self._decoder = Decoder(accepts, receive_limit)
        self._send_limit = send_limit
        self._max_fds = max_fds
        self._fds: list[int] = []

    def fileno(self) -> int:
        """Return the descriptor, for polling."""
        return self._sock.fileno()

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Write the whole frame."""
        frame = memoryview(encode(message, self._send_limit))
        if fds:
            sent = socket.send_fds(self._sock, [frame], list(fds))
            frame = frame[sent:]
        self._sock.sendall(frame)

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for the next message and the descriptors that came beside it.

        Raises:
            PeerClosed: there will be none.
        """
        while (message := self._decoder.next()) is None:
            data, fds = _receive(self._sock, self._max_fds)
            self._decoder.feed(data)
            self._fds += fds
        return message, _take(self._fds, message)


class AsyncChannel:
    """The worker's end of a socketpair, on the running event loop."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        accepts: Sequence[type[Any]],
        receive_limit: int,
        max_fds: int = 0,
    ) -> None:
        sock.settimeout(0)
        self._sock = sock
        self._sending = asyncio.Lock()
        self._decoder = Decoder(accepts, receive_limit)
        self._max_fds = max_fds
        self._fds: list[int] = []

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Write the whole frame.

        Raises:
            PeerClosed: nobody reads it.
        """
        frame = memoryview(encode(message, FROM_WORKER_BYTES))
        async with self._sending:
            self._check_open()
            try:
                if fds:
                    frame = frame[await self._send_fds(frame, fds) :]
                await asyncio.get_running_loop().sock_sendall(self._sock, frame)
            except (BrokenPipeError, ConnectionResetError) as error:
                raise PeerClosed("the other end closed the socket") from error

    async def receive(self) -> tuple[Message, list[int]]:
        """Wait for the next message and the descriptors that came beside it.

        Raises:
            PeerClosed: there will be none.
            RemoteProtocolError: the peer broke the protocol; kill it.
        """
        while (message := self._decoder.next()) is None:
            self._check_open()
            try:
                data, fds = _receive(self._sock, self._max_fds)
            except BlockingIOError:
                await self._readable()
                continue
            except ConnectionResetError as error:
                raise PeerClosed("the other end closed the socket") from error
            self._decoder.feed(data)
            self._fds += fds
        return message, _take(self._fds, message)

    def close(self) -> None:
        """Close the socket and the descriptors that nobody took."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        self._sock.close()

    def _check_open(self) -> None:
        if self._sock.fileno() < 0:
            raise PeerClosed("this end closed the socket: the other is gone")

    async def _send_fds(self, frame: memoryview, fds: Sequence[int]) -> int:
        """Send the descriptors and as much of the frame as goes with them."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return socket.send_fds(self._sock, [frame], list(fds))
            except BlockingIOError:
                await self._once(loop.add_writer, loop.remove_writer)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        await self._once(loop.add_reader, loop.remove_reader)

    async def _once(self, add: Callable[..., Any], remove: Callable[..., Any]) -> None:
        """Wait until the callback that `add` installs is called."""
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        add(self._sock, settle, ready)
        try:
            await ready
        finally:
            remove(self._sock)
