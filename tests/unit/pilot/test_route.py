"""The ways out of a node with real sockets: what speaks SOCKS goes through proxies that speak CONNECT."""

from __future__ import annotations

import asyncio
import gc
import secrets
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route as HttpRoute

from edif_hpc.errors import LaunchError, Unavailable
from edif_hpc.launcher.forward import Forwarder
from edif_hpc.pilot.joining import join
from edif_hpc.pilot.route import Way, dial_by, way_out
from edif_hpc.pilot.tunnel import Tunnel
from edif_hpc.slurm.order import ForwardFile, PilotOrder, Route, RouteKind, write_forward
from edif_hpc.slurm.site import Site
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire.sockets import Dealer, Incoming, KeyPair, LinkEvent, Router
from edif_hpc.wire.streams import Address, NoWay, Stream
from edif_hpc.worker.transfer import Transfer

WAIT_S = 20.0
LOOPBACK = Address("127.0.0.1", 0)


class Outside:
    """What is to be reached: HTTP, and ZeroMQ that answers each message with itself."""

    def __init__(self) -> None:
        self.keys, self.peer = KeyPair.generate(), KeyPair.generate()
        self.router = Router(
            bind="tcp://127.0.0.1:*",
            keys=self.keys,
            known=lambda key: key == self.peer.public,
            on_batch=self.answer,
        )
        app = Starlette(routes=[HttpRoute("/", self.size, methods=["PUT"])])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))

    def answer(self, batch: list[Incoming]) -> None:
        for each in batch:
            self.router.send(each.route, each.frame)

    async def size(self, request: Request) -> Response:
        return PlainTextResponse(str(len(await request.body())))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def get(self, _path: str) -> Any:
        return {"urls": [self.router.endpoint]}


@pytest.fixture
async def outside() -> AsyncIterator[Outside]:
    made = Outside()
    serving = asyncio.create_task(made.server.serve())
    await wait_until_async(lambda: made.server.started, WAIT_S, "it serves")
    yield made
    made.server.should_exit = True
    await serving
    made.router.close()


@asynccontextmanager
async def forwarding(folder: Path, outside: Outside) -> AsyncIterator[Route]:
    """A forwarder that knows where to; gives the route for pilots."""
    site = Site(name="here", scheduler="slurm", state_dir=folder / "state", route="login")
    forwarder = Forwarder(site=site, relay=outside, listen=LOOPBACK)
    running = asyncio.create_task(forwarder.run(lambda _: None))
    await wait_until_async(lambda: len(forwarder.allowed) == 2, WAIT_S, "it knows where to")
    try:
        yield site.way_out
    finally:
        forwarder.stop()
        await running


class Line:
    """A connection by ZeroMQ."""

    def __init__(self, outside: Outside, endpoint: str) -> None:
        self.heard: list[bytes] = []
        self.events: list[LinkEvent] = []
        self.dealer = Dealer(
            endpoint=endpoint,
            server_key=outside.keys.public,
            keys=outside.peer,
            on_batch=self.heard.extend,
            on_event=lambda event, _: self.events.append(event),
        )

    async def says(self) -> None:
        """Say something new until it is heard: what is said into a broken connection is lost."""
        text = secrets.token_bytes(8)
        for _ in range(int(WAIT_S)):
            self.dealer.send(text)
            with suppress(TimeoutError):
                await wait_until_async(lambda: text in self.heard, 1.0, "an answer")
                return
        raise TimeoutError(f"it is not answered; {self.events}")


async def refused(url: str, way: Way) -> None:
    """It cannot be reached. httpx leaves its connection to the proxy to the garbage collector, which complains."""
    with suppress(httpx.ProxyError):
        await put(url, way, 1)
        pytest.fail(f"{url} was reached")
    collect()


def collect() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


async def put(url: str, way: Way, size: int) -> int:
    async with httpx.AsyncClient(proxy=way.proxy, timeout=WAIT_S) as http:
        return int((await http.put(url, content=b"x" * size)).text)


async def test_both_protocols_go_through_the_login_node(tmp_path: Path, outside: Outside) -> None:
    async with forwarding(tmp_path, outside) as route, way_out(route) as way:
        assert await put(outside.url, way, 5 << 20) == 5 << 20
        endpoint = await way.endpoint(outside.router.endpoint)
        assert endpoint != outside.router.endpoint
        line = Line(outside, endpoint)
        await line.says()
        await line.dealer.close()
        assert way.trouble == ""


async def test_a_forwarder_that_was_started_anew_is_found(
    tmp_path: Path, outside: Outside
) -> None:
    """At another port, with another secret; nobody is told but by the file."""
    async with forwarding(tmp_path, outside) as route:
        pass
    async with way_out(route) as way:
        await refused(outside.url, way)
        assert "start `edif-hpc launcher forward` on a login node" in way.trouble
        line = Line(outside, await way.endpoint(outside.router.endpoint))
        for _ in range(2):
            async with forwarding(tmp_path, outside):
                await line.says()
                assert await put(outside.url, way, 3) == 3
            line.events.clear()
            await wait_until_async(lambda: line.events, WAIT_S, "it is seen to be gone")
        await line.dealer.close()


async def test_a_proxy_of_the_site_is_asked_without_a_secret(outside: Outside) -> None:
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 403 Not on our network\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with way_out(Route(kind="connect", proxy=proxy)) as way:
        await refused("http://relay.test:81", way)
    server.close()
    assert heads == [b"CONNECT relay.test:81 HTTP/1.1\r\nhost: relay.test:81\r\n\r\n"]
    assert (
        way.trouble
        == f"the proxy {proxy} does not pass on to relay.test:81: 403 Not on our network"
    )


async def test_the_tunnel_is_for_our_own_processes(tmp_path: Path, outside: Outside) -> None:
    async with forwarding(tmp_path, outside) as route, way_out(route) as way:
        port = httpx.URL(str(way.proxy)).port
        for foreign in (f"socks5://127.0.0.1:{port}", f"socks5://edif:guess@127.0.0.1:{port}"):
            await refused(outside.url, Way(proxy=foreign))


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        (b"\x05\x01\x00", b"\x05\xff"),  # without a password
        (b"\x04\x01", b"\x05\xff"),  # another version
        (b"\x05\x01\x02" + b"\x01\x04edif\x05guess", b"\x05\x02\x01\x01"),
    ],
)
async def test_who_goes_on_regardless_is_cut_off(said: bytes, heard: bytes) -> None:
    """A client of a stranger's does not stop because it is told no."""
    gone: list[Address] = []

    async def out(where: Address) -> Stream:
        gone.append(where)
        raise NoWay("never")

    tunnel = Tunnel(out)
    proxy = httpx.URL(await tunnel.open_proxy())
    reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
    writer.write(said + b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x09")
    with suppress(ConnectionResetError):
        assert await asyncio.wait_for(reader.read(), WAIT_S) == heard
    writer.close()
    await tunnel.close()
    assert gone == []


async def test_a_proxy_that_refuses_is_hung_up_on() -> None:
    ended = asyncio.Event()

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        await reader.read()
        writer.close()
        ended.set()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    proxy = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    with pytest.raises(NoWay, match="403 Forbidden"):
        await dial_by(Route(kind="connect", proxy=proxy))(Address("relay.test", 81))
    await asyncio.wait_for(ended.wait(), WAIT_S)
    server.close()


@pytest.mark.parametrize("answers", [[b""], [b"\x05\x00", b""]])
async def test_a_tunnel_that_hangs_up_is_a_failure_like_others(
    tmp_path: Path, answers: list[bytes]
) -> None:
    """Its pilot is going, or it has too much to do: the worker tries again."""
    async with saying(*answers) as proxy:
        transfer = Transfer(proxy=f"socks5://{proxy}")
        with pytest.raises(Unavailable):
            await transfer.fetch("http://relay.test/x", tmp_path / "x", size_bytes=1, sha256="")
        with pytest.raises(Unavailable):
            await transfer.put("http://relay.test/x", parts(), 1)
        await transfer.close()
        order = PilotOrder(
            name="a", relay_url="http://relay.test", join_token="", scratch="", join_s=0
        )
        with pytest.raises(LaunchError, match="cannot be reached from"):
            await join(
                order, Way(proxy=f"socks5://{proxy}"), node="n1", worker_key="", pilot_key=""
            )
        collect()


async def parts() -> AsyncIterator[bytes]:
    yield b"x"


@asynccontextmanager
async def saying(*answers: bytes) -> AsyncIterator[str]:
    """A server that says its piece, an answer for each thing that it hears."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for each in answers:
            await reader.read(1 << 16)
            writer.write(each)
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@pytest.mark.parametrize(
    ("kind", "answers", "trouble"),
    [
        ("connect", [b"SSH-2.0-x\r\n\r\n"], "{proxy} does not answer like a proxy"),
        ("connect", [b""], "{proxy} does not answer like a proxy"),
        ("connect", [b"x" * 100_000], "{proxy} does not answer like a proxy"),
        ("socks", [b"\x05"], "{proxy} does not answer like a proxy"),
        ("socks", [b"HTTP/1.1 400 Bad Request\r\n\r\n"], "it speaks no SOCKS5"),
        ("socks", [b"\x05\xff"], "it wants a password"),
        ("socks", [b"\x05\x00", b"\x05\x02\x00\x01"], "relay.test:81: its rules forbid it"),
        ("socks", [b"\x05\x00", b"\x05\x63\x00\x01"], "relay.test:81: code 99"),
    ],
)
async def test_what_a_proxy_says_is_told(
    kind: RouteKind, answers: list[bytes], trouble: str
) -> None:
    async with saying(*answers) as proxy, way_out(Route(kind=kind, proxy=proxy)) as way:
        await refused("http://relay.test:81", way)
        assert trouble.replace("{proxy}", proxy) in way.trouble


@pytest.mark.parametrize(
    "sender", [b"\x01" + bytes(6), b"\x04" + bytes(18), b"\x03\x02ab" + bytes(2)]
)
async def test_what_follows_the_proxys_answer_is_the_other_ends(sender: bytes) -> None:
    answers = [b"\x05\x00", b"\x05\x00\x00" + sender + b"hello"]
    async with saying(*answers) as proxy:
        stream = await dial_by(Route(kind="socks", proxy=proxy))(Address("relay.test", 81))
        assert await stream.reader.read() == b"hello"
        stream.writer.close()
    async with saying(b"HTTP/1.1 200 OK\r\n\r\nhello") as proxy:
        stream = await dial_by(Route(kind="connect", proxy=proxy))(Address("relay.test", 81))
        assert await stream.reader.read() == b"hello"
        stream.writer.close()


async def test_a_file_that_others_may_read_is_not_trusted(tmp_path: Path) -> None:
    file = tmp_path / "forward.json"
    write_forward(file, ForwardFile(address="127.0.0.1:9", secret="s"))
    route = Route(kind="login", forward_file=str(file))
    async with way_out(route) as way:
        await refused("http://relay.test:81", way)
        assert "127.0.0.1:9 does not answer" in way.trouble
        file.chmod(0o644)
        await refused("http://relay.test:81", way)
        assert "others may read it" in way.trouble


async def test_a_way_that_needs_no_tunnel() -> None:
    async with way_out(Route()) as way:
        assert way.proxy is None
        assert await way.endpoint("tcp://relay.test:1") == "tcp://relay.test:1"
