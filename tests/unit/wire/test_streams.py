"""Passing connections on, and what an open port must not do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from edif_hpc.errors import InvalidInput
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire.streams import Address, NoWay, Passage, Stream, dial

WAIT_S = 20.0
LOOPBACK = Address("127.0.0.1", 0)


class Server:
    """Holds its connections, and reads what comes."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.heard = bytearray()
        self.ended = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.streams.append(Stream(reader, writer))
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                self.heard += data
        self.ended += 1


@asynccontextmanager
async def passing(**limits: int) -> AsyncIterator[tuple[Server, Passage, Address]]:
    """A passage to a server, for those who say `go` and a line's end."""
    server = Server()
    listening = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    where = Address("127.0.0.1", listening.sockets[0].getsockname()[1])

    async def lead(client: Stream) -> tuple[Stream, str]:
        if await client.reader.readline() != b"go\n":
            client.writer.write(b"no\n")
            raise NoWay("it does not say go")
        return await dial(where), str(where)

    passage = Passage(lead, **limits)
    try:
        yield server, passage, await passage.listen(LOOPBACK)
    finally:
        await passage.close()
        listening.close()
        for each in server.streams:
            each.writer.close()


async def come(address: Address, said: bytes = b"go\n") -> Stream:
    stream = Stream(*await asyncio.open_connection(*address))
    stream.writer.write(said)
    return stream


async def rest(stream: Stream) -> bytes:
    """What still comes; a reset is an end."""
    try:
        return await asyncio.wait_for(stream.reader.read(), WAIT_S)
    except ConnectionError:
        return b""
    finally:
        stream.writer.close()


async def until(predicate: Any, what: str) -> None:
    await wait_until_async(predicate, WAIT_S, what)


async def test_half_a_connection_may_end_first() -> None:
    async with passing() as (server, _, address):
        client = await come(address, b"go\nall that I say")
        client.writer.write_eof()
        await until(lambda: server.ended, "the server hears the end")
        assert server.heard == b"all that I say"
        server.streams[0].writer.write(b"an answer after the end")
        server.streams[0].writer.close()
        assert await rest(client) == b"an answer after the end"


async def test_one_that_breaks_ends_the_other() -> None:
    async with passing() as (server, _, address):
        client = await come(address)
        await until(lambda: server.streams, "it is led there")
        client.writer.transport.abort()
        await until(lambda: server.ended, "the server hears of it")


async def test_a_refusal_is_read_before_the_end() -> None:
    async with passing() as (server, _, address):
        assert await rest(await come(address, b"please\n")) == b"no\n"
        assert server.streams == []


async def test_who_says_nothing_gives_way() -> None:
    async with passing(greeting=2) as (server, _, address):
        silent = [await come(address, b"g") for _ in range(2)]
        client = await come(address)
        await until(lambda: server.streams, "it is led there")
        assert await rest(silent[0]) == b""
        client.writer.write(b"data")
        await until(lambda: server.heard == b"data", "the others are not touched")
        silent[1].writer.close()
        client.writer.close()


async def test_so_many_pass_and_no_more() -> None:
    async with passing(passing=1) as (server, passage, address):
        first = await come(address)
        await until(lambda: server.streams, "it is led there")
        assert await rest(await come(address)) == b""
        first.writer.close()
        server.streams[0].writer.close()
        await until(lambda: not passage.passing, "its place is free")
        another = await come(address, b"go\nthe next")
        await until(lambda: server.heard == b"the next", "which another takes")
        another.writer.close()


async def test_the_end_of_the_passage_ends_all() -> None:
    async with passing() as (server, passage, address):
        client, silent = await come(address), await come(address, b"g")
        await until(lambda: server.streams, "it is led there")
        await passage.close()
        assert [await rest(client), await rest(silent)] == [b"", b""]
        with pytest.raises(NoWay, match="does not answer"):
            await dial(address)


@pytest.mark.parametrize(
    "text", ["", "a", "a:", ":1", "a:b", "a:70000", "a@b:1", "::1:80", "[a:1"]
)
def test_no_address(text: str) -> None:
    with pytest.raises(InvalidInput, match="is not HOST:PORT"):
        Address.parse(text)


@pytest.mark.parametrize("text", ["a.b:1", "10.0.0.1:65535", "[2001:db8::1]:80"])
def test_an_address(text: str) -> None:
    assert str(Address.parse(text)) == text
