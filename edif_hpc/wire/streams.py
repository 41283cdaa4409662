"""Passing TCP connections on: what the pilot's tunnel and the login node's forwarder have in common.

A `Passage` listens. Somebody who connects says first where to (in SOCKS or HTTP, that is the business of `lead`), is led
there, and from then on bytes go both ways, unread, until one side ends. Half a connection may end before the other half.

What an open port must not do is hold resources for anybody who knocks: leading has a deadline, at most `greeting`
connections are led at a time (the oldest one gives way), and at most `passing` pass. What is dead is found by TCP keepalive.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Final, NamedTuple

from edif_hpc.errors import EdifError, InvalidInput

_log = logging.getLogger(__name__)

LEADING_S: Final = 30.0
CONNECT_S: Final = 10.0
GREETING: Final = 64
PASSING: Final = 400  # two descriptors each, and a login node gives a process 1024
_PIECE = 64 << 10
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}


class NoWay(EdifError):
    """A connection is not led where it wants to go; the text says why."""

    code = "no_way"


class Address(NamedTuple):
    """A host, by name or number, and a port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `HOST:PORT`; an IPv6 host is in brackets."""
        host, colon, port = text.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if not colon or not bare or (":" in bare) is not host.startswith("[") or "@" in host:
            raise InvalidInput(f"{text!r} is not HOST:PORT")
        if not (port.isascii() and port.isdecimal() and int(port) < 65536):
            raise InvalidInput(f"{text!r} is not HOST:PORT: {port!r} is no port")
        return cls(bare.lower(), int(port))

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Stream(NamedTuple):
    """The two halves of one connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


#: Learns from a new connection where it wants to go, and returns the connection to there and what to call it.
Lead = Callable[[Stream], Awaitable[tuple[Stream, str]]]


async def dial(address: Address) -> Stream:
    """Connect.

    Raises:
        NoWay: nobody answers.
    """
    try:
        async with asyncio.timeout(CONNECT_S):
            stream = Stream(*await asyncio.open_connection(address.host, address.port))
    except OSError as error:  # a TimeoutError is one
        why = str(error) or "it timed out"
        raise NoWay(f"{address} does not answer: {why}") from error
    _keep_alive(stream)
    return stream


class Passage:
    """Listens, leads and passes; made on a running loop."""

    def __init__(self, lead: Lead, *, greeting: int = GREETING, passing: int = PASSING) -> None:
        self._lead, self._most_greeting, self._most_passing = lead, greeting, passing
        self._greeting: dict[asyncio.Task[None], None] = {}  # the oldest first
        self._passing: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def listen(self, address: Address) -> Address:
        """Begin; returns the address, with the port that was given for port 0."""
        self._server = await asyncio.start_server(self._came, address.host, address.port)
        return Address(address.host, self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """End, with all connections."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._greeting, *self._passing]
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def passing(self) -> int:
        """How many connections pass at present."""
        return len(self._passing)

    def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._greeting) >= self._most_greeting:
            next(iter(self._greeting)).cancel()
        task = asyncio.create_task(self._serve(Stream(reader, writer)), name="pass-on")
        self._greeting[task] = None
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._greeting.pop(task, None)
        self._passing.discard(task)

    async def _serve(self, client: Stream) -> None:
        peer = str(Address(*client.writer.get_extra_info("peername")[:2]))
        try:
            _keep_alive(client)
            async with asyncio.timeout(LEADING_S):
                server, where = await self._lead(client)
            with closing(server.writer):
                self._admit()
                facts = await _pass_on(client, server)
            _log.info(
                "passed on", extra={"event": "passed_on", "peer": peer, "to": where, **facts}
            )
        except (NoWay, OSError, EOFError) as error:  # a TimeoutError is an OSError
            said = str(error) or type(error).__name__
            _log.warning("not passed on: %s", said, extra={"event": "no_way", "peer": peer})
        except asyncio.CancelledError:
            client.writer.transport.abort()  # what it has not read yet is lost
            raise
        finally:
            client.writer.close()

    def _admit(self) -> None:
        task = asyncio.current_task()
        if task is None or len(self._passing) >= self._most_passing:
            raise NoWay(f"{self._most_passing} connections pass already")
        self._greeting.pop(task, None)
        self._passing.add(task)


async def _pass_on(client: Stream, server: Stream) -> dict[str, object]:
    """Pass bytes both ways until both have ended, or one has broken; returns what there is to tell of it."""
    began, counts, end = asyncio.get_running_loop().time(), {"up": 0, "down": 0}, "closed"

    async def copy(source: Stream, target: Stream, way: str) -> None:
        while data := await source.reader.read(_PIECE):
            counts[way] += len(data)
            target.writer.write(data)
            await target.writer.drain()
        target.writer.write_eof()

    ways = [
        asyncio.create_task(copy(client, server, "up")),
        asyncio.create_task(copy(server, client, "down")),
    ]
    try:
        await asyncio.gather(*ways)
    except OSError as error:
        end = error.strerror or "broken"
    finally:
        for each in ways:
            each.cancel()
    seconds = round(asyncio.get_running_loop().time() - began, 1)
    return {"seconds": seconds, "end": end, **counts}


def _keep_alive(stream: Stream) -> None:
    plain: socket.socket = stream.writer.get_extra_info("socket")
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        plain.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
