"""How a connection is made through a proxy: an HTTP proxy that allows CONNECT, or a SOCKS5 proxy.

Two ways to say where to, and then the stream belongs to the two ends. Not a byte more than the proxy's answer is read here,
because what follows it at once may be the other end's: a ZeroMQ socket greets first.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import h11

from edif_hpc.slurm.order import FORWARD_USER
from edif_hpc.wire.streams import Address, NoWay, Stream, dial

SOCKS: Final = 5
CONNECT: Final = 1
IPV4, NAME, IPV6 = 1, 3, 4
ANSWER_S: Final = 15.0
_REFUSALS: Final = (
    "",
    "it failed",
    "its rules forbid it",
    "no route to that network",
    "no route to that host",
    "nobody listens there",
    "it took too long",
    "it does not serve CONNECT",
    "it does not know such addresses",
)

#: Makes a connection to an address outside; raises `NoWay`.
Dial = Callable[[Address], Awaitable[Stream]]


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A proxy, and the secret that it wants to hear."""

    address: Address
    secret: str = ""


async def by_connect(proxy: Proxy, where: Address) -> Stream:
    """Through an HTTP proxy.

    Raises:
        NoWay: it does not answer, or refuses.
    """
    return await _through(proxy, where, _ask_http)


async def by_socks(proxy: Proxy, where: Address) -> Stream:
    """Through a SOCKS5 proxy, which also looks up names.

    Raises:
        NoWay: it does not answer, or refuses.
    """
    return await _through(proxy, where, _ask_socks)


async def _through(
    proxy: Proxy, where: Address, ask: Callable[[Proxy, Address, Stream], Awaitable[str]]
) -> Stream:
    stream, passed = await dial(proxy.address), False
    try:
        async with asyncio.timeout(ANSWER_S):
            refusal = await ask(proxy, where, stream)
        passed = not refusal
    except (OSError, EOFError, asyncio.LimitOverrunError, h11.RemoteProtocolError) as error:
        raise NoWay(f"{proxy.address} does not answer like a proxy: {error!r}") from error
    finally:
        if not passed:
            stream.writer.close()
    if refusal:
        raise NoWay(f"the proxy {proxy.address} does not pass on to {where}: {refusal}")
    return stream


async def _ask_http(proxy: Proxy, where: Address, stream: Stream) -> str:
    """Ask; returns how it refuses."""
    headers = [("host", str(where))]
    if proxy.secret:
        pair = base64.b64encode(f"{FORWARD_USER}:{proxy.secret}".encode()).decode()
        headers.append(("proxy-authorization", f"Basic {pair}"))
    http = h11.Connection(h11.CLIENT)
    request = h11.Request(method="CONNECT", target=str(where), headers=headers)
    stream.writer.write(http.send(request) or b"")
    http.receive_data(await stream.reader.readuntil(b"\r\n\r\n"))
    answer = http.next_event()
    if not isinstance(answer, h11.Response):
        raise h11.RemoteProtocolError(f"{answer!r}")
    if answer.status_code < 300:
        return ""
    return f"{answer.status_code} {answer.reason.decode(errors='replace')}"


async def _ask_socks(_proxy: Proxy, where: Address, stream: Stream) -> str:
    """Ask; returns how it refuses."""
    reader, writer = stream
    name = where.host.encode()
    writer.write(bytes((SOCKS, 1, 0)))  # without a password
    version, method = await reader.readexactly(2)
    if (version, method) != (SOCKS, 0):
        return "it speaks no SOCKS5" if version != SOCKS else "it wants a password"
    asked = bytes((SOCKS, CONNECT, 0, NAME, len(name))) + name + where.port.to_bytes(2)
    writer.write(asked)
    _, code, _, kind = await reader.readexactly(4)
    if code:
        return _REFUSALS[code] if code < len(_REFUSALS) else f"code {code}"
    rest = {IPV4: 4, IPV6: 16}.get(kind) or (await reader.readexactly(1))[0]
    await reader.readexactly(rest + 2)  # the address that it sends from
    return ""
