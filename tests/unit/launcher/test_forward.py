"""The forwarder with real sockets: who is passed on, where to, and what everybody else hears."""

from __future__ import annotations

import asyncio
import base64
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.errors import NotAuthenticated, SettingsError, Unavailable
from edif_hpc.launcher.forward import Forwarder, address_of, beside
from edif_hpc.slurm.order import read_forward
from edif_hpc.slurm.site import Site
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire.streams import Address, Stream

WAIT_S = 20.0
LOOPBACK = Address("127.0.0.1", 0)


@dataclass
class FakeRelay:
    """Tells addresses, or raises."""

    url: str
    urls: list[str] = field(default_factory=list)
    away: Exception | None = None
    asked: int = 0

    def get(self, path: str) -> Any:
        assert path == "/api/launcher/addresses"
        self.asked += 1
        if self.away is not None:
            raise self.away
        return {"urls": self.urls}


@asynccontextmanager
async def echo() -> AsyncIterator[Address]:
    """A server that sends back what it gets, after a greeting, as ZeroMQ has one."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"hello ")
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield Address("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()


def site(folder: Path) -> Site:
    return Site(name="here", scheduler="slurm", state_dir=folder / "state", route="login")


@asynccontextmanager
async def forwarding(
    folder: Path, relay: FakeRelay, **facts: Any
) -> AsyncIterator[tuple[Forwarder, Address]]:
    forwarder = Forwarder(site=site(folder), relay=relay, listen=LOOPBACK, **facts)
    ready: asyncio.Future[Address] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(forwarder.run(ready.set_result))
    try:
        yield forwarder, await asyncio.wait_for(ready, WAIT_S)
    finally:
        forwarder.stop()
        await task


async def ask(proxy: Address, head: str) -> Stream:
    stream = Stream(*await asyncio.open_connection(*proxy))
    stream.writer.write(head.replace("\n", "\r\n").encode())
    return stream


async def refusal(proxy: Address, head: str) -> str:
    stream = await ask(proxy, head)
    answer = await stream.reader.read()  # it hangs up
    stream.writer.close()
    return answer.decode()


def connect(where: Address, secret: str | None) -> str:
    pair = base64.b64encode(f"edif:{secret}".encode()).decode()
    known = f"Proxy-Authorization: Basic {pair}\n" if secret is not None else ""
    return f"CONNECT {where} HTTP/1.1\nHost: {where}\n{known}\n"


async def test_it_passes_on_to_the_relay(tmp_path: Path) -> None:
    async with (
        echo() as there,
        forwarding(tmp_path, FakeRelay(url=f"http://{there}")) as (forwarder, proxy),
    ):
        stream = await ask(proxy, connect(there, forwarder.secret))
        assert (await stream.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        data = b"x" * (3 << 20)
        stream.writer.write(data)
        stream.writer.write_eof()
        assert await stream.reader.read(-1) == b"hello " + data
        stream.writer.close()


async def test_addresses_are_the_relays_to_tell(tmp_path: Path) -> None:
    async with echo() as there:
        relay = FakeRelay(url="https://relay.test", urls=[f"tcp://{there}", "https://s3.test"])
        async with forwarding(tmp_path, relay) as (forwarder, proxy):
            await wait_until_async(lambda: there in forwarder.allowed, WAIT_S, "it was told")
            assert forwarder.allowed == {
                there,
                Address("relay.test", 443),
                Address("s3.test", 443),
            }
            stream = await ask(proxy, connect(there, forwarder.secret))
            assert (await stream.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
            stream.writer.close()


async def test_what_is_known_stands_while_the_relay_is_away(tmp_path: Path) -> None:
    relay = FakeRelay(url="https://relay.test", urls=["tcp://relay.test:8711"])
    async with forwarding(tmp_path, relay, refresh_s=0.01) as (forwarder, _):
        told = {Address("relay.test", 443), Address("relay.test", 8711)}
        await wait_until_async(lambda: forwarder.allowed == told, WAIT_S, "it was told")
        relay.away = Unavailable("gone for a while")
        asked = relay.asked
        await wait_until_async(lambda: relay.asked > asked + 2, WAIT_S, "it asks on")
        assert forwarder.allowed == told


@pytest.mark.parametrize("secret", [None, "", "wrong"])
async def test_without_the_secret_nobody_is_passed_on(tmp_path: Path, secret: str | None) -> None:
    async with (
        echo() as there,
        forwarding(tmp_path, FakeRelay(url=f"http://{there}")) as (_, proxy),
    ):
        answer = await refusal(proxy, connect(there, secret))
    assert answer.startswith("HTTP/1.1 407 ")
    assert 'Proxy-Authenticate: Basic realm="edif-hpc"' in answer


async def test_there_is_no_way_to_anywhere_else(tmp_path: Path) -> None:
    async with (
        echo() as there,
        forwarding(tmp_path, FakeRelay(url="https://relay.test")) as (forwarder, proxy),
    ):
        answer = await refusal(proxy, connect(there, forwarder.secret))
    assert answer.startswith("HTTP/1.1 403 ")
    assert f"relay.test:443 and nowhere else, not to {there}" in answer


async def test_a_relay_that_does_not_answer_is_named(tmp_path: Path) -> None:
    async with echo() as there:
        pass
    async with forwarding(tmp_path, FakeRelay(url=f"http://{there}")) as (forwarder, proxy):
        answer = await refusal(proxy, connect(there, forwarder.secret))
    assert answer.startswith("HTTP/1.1 502 ")
    assert f"{there} does not answer" in answer


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("GET / HTTP/1.1\nHost: a\n{known}\n", 405),
        ("CONNECT nowhere HTTP/1.1\nHost: a\n{known}\n", 400),
        ("\x16\x03\x01 TLS?\n\n", 400),
        ("CONNECT a:1 HTTP/1.1\nHost: a\nX: " + "y" * 70_000 + "\n\n", 400),
    ],
)
async def test_what_is_no_request_is_refused(tmp_path: Path, head: str, status: int) -> None:
    async with forwarding(tmp_path, FakeRelay(url="https://relay.test")) as (forwarder, proxy):
        pair = base64.b64encode(f"edif:{forwarder.secret}".encode()).decode()
        told = head.replace("{known}", f"Proxy-Authorization: Basic {pair}\n")
        assert (await refusal(proxy, told)).startswith(f"HTTP/1.1 {status} ")


async def test_pilots_find_it_in_a_file_of_our_own(tmp_path: Path) -> None:
    relay = FakeRelay(url="https://relay.test")
    file = site(tmp_path).forward_file
    async with forwarding(tmp_path, relay) as (forwarder, proxy):
        told = read_forward(file)
        assert (told.address, told.secret) == (str(proxy), forwarder.secret)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        async with forwarding(tmp_path, relay) as (_, other):
            assert read_forward(file).address == str(other), "the newest counts"
        assert not file.exists()
    assert not file.exists()


async def test_the_one_that_ends_leaves_its_successors_file(tmp_path: Path) -> None:
    relay = FakeRelay(url="https://relay.test")
    file = site(tmp_path).forward_file
    ended = forwarding(tmp_path, relay)
    await ended.__aenter__()
    async with forwarding(tmp_path, relay) as (_, other):
        await ended.__aexit__(None, None, None)
        assert read_forward(file).address == str(other)


async def test_beside_something_else(tmp_path: Path) -> None:
    def both() -> None:
        with beside(Forwarder(site=site(tmp_path), relay=relay, listen=LOOPBACK)) as address:
            assert read_forward(site(tmp_path).forward_file).address == str(address)

    relay = FakeRelay(url="https://relay.test", away=NotAuthenticated("no such token"))
    await asyncio.to_thread(both)
    assert not site(tmp_path).forward_file.exists()


def test_an_address_that_is_not_ours(tmp_path: Path) -> None:
    relay = FakeRelay(url="https://relay.test")
    elsewhere = Forwarder(site=site(tmp_path), relay=relay, listen=Address("192.0.2.1", 0))
    told = r"cannot listen on 192.0.2.1:0.*--listen HOST:PORT"
    with pytest.raises(SettingsError, match=told), beside(elsewhere):
        pass


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://Relay.test/x", "relay.test:443"),
        ("http://relay.test:80", "relay.test:80"),
        ("tcp://[2001:db8::1]:8711", "[2001:db8::1]:8711"),
    ],
)
def test_where_a_url_leads(url: str, address: str) -> None:
    assert str(address_of(url)) == address
    assert Address.parse(address) == address_of(url)
