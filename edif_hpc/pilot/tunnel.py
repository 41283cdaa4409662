"""A way out of a node for the pilot and its worker, whatever kind of proxy stands there.

    ZeroMQ   dials a port of the loopback that leads to the relay's socket and nowhere else
    HTTP     goes through a SOCKS5 proxy on the loopback, which asks the site's proxy for each connection

The worker in its container shares the node's network, so it uses the same. ZeroMQ could speak SOCKS itself, but libzmq 4.3.5 aborts
the process when a socket is closed whose proxy does not answer. TLS and CURVE go through, end to end.

On a shared node other people's processes reach these ports too. The SOCKS proxy wants to hear a secret of this tunnel; the other
port leads to a socket that anybody in the world may knock at.
"""

from __future__ import annotations

import ipaddress
import secrets
from typing import Final

from edif_hpc.pilot.upstream import CONNECT, IPV4, IPV6, NAME, SOCKS, Dial
from edif_hpc.wire.streams import Address, NoWay, Passage, Stream

_HERE: Final = Address("127.0.0.1", 0)
_USER: Final = "edif"
_USER_PASSWORD, _NO_METHOD, _SUB = 2, 0xFF, 1
_OPENED, _UNREACHABLE, _NOT_SUPPORTED = 0, 4, 7


class Tunnel:
    """Ports of the loopback that lead outside, by `dial`."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._secret = secrets.token_urlsafe(24)
        self._passages: list[Passage] = []
        self.trouble = ""  #: why the last connection could not be made; empty if it could

    async def open_proxy(self) -> str:
        """Be a SOCKS proxy; returns its URL, with the secret."""
        passage = self._passage(Passage(self._lead))
        return f"socks5://{_USER}:{self._secret}@{await passage.listen(_HERE)}"

    async def open_port(self, where: Address) -> Address:
        """Have a port that leads to one address."""

        async def lead(_client: Stream) -> tuple[Stream, str]:
            return await self._out(where), str(where)

        return await self._passage(Passage(lead)).listen(_HERE)

    async def close(self) -> None:
        """End it, with all that goes through it."""
        for each in self._passages:
            await each.close()

    def _passage(self, made: Passage) -> Passage:
        self._passages.append(made)
        return made

    async def _out(self, where: Address) -> Stream:
        try:
            stream = await self._dial(where)
        except NoWay as error:
            self.trouble = str(error)
            raise
        self.trouble = ""
        return stream

    async def _lead(self, client: Stream) -> tuple[Stream, str]:
        await _authenticate(client, self._secret)
        where = await _wanted(client)
        try:
            stream = await self._out(where)
        except NoWay:
            _reply(client, _UNREACHABLE)
            raise
        _reply(client, _OPENED)
        return stream, str(where)


async def _authenticate(client: Stream, secret: str) -> None:
    """RFC 1929: a name and a password."""
    version, count = await client.reader.readexactly(2)
    methods = await client.reader.readexactly(count)
    if version != SOCKS or _USER_PASSWORD not in methods:
        client.writer.write(bytes((SOCKS, _NO_METHOD)))
        raise NoWay("it does not speak SOCKS5 with a password")
    client.writer.write(bytes((SOCKS, _USER_PASSWORD)))
    await client.reader.readexactly(1)
    await _text(client)
    right = secrets.compare_digest(await _text(client), secret.encode())
    client.writer.write(bytes((_SUB, int(not right))))
    if not right:
        raise NoWay("it does not know this tunnel's secret")


async def _wanted(client: Stream) -> Address:
    """Read where it wants to go (RFC 1928)."""
    _, command, _, kind = await client.reader.readexactly(4)
    if command != CONNECT or kind not in (IPV4, NAME, IPV6):
        _reply(client, _NOT_SUPPORTED)
        raise NoWay(f"it wants command {command} to an address of kind {kind}")
    if kind == NAME:
        host = (await _text(client)).decode("ascii", errors="replace")
    else:
        number = await client.reader.readexactly(4 if kind == IPV4 else 16)
        host = str(ipaddress.ip_address(number))
    port = int.from_bytes(await client.reader.readexactly(2))
    return Address(host.lower(), port)


async def _text(client: Stream) -> bytes:
    (length,) = await client.reader.readexactly(1)
    return await client.reader.readexactly(length)


def _reply(client: Stream, code: int) -> None:
    client.writer.write(bytes((SOCKS, code, 0, IPV4)) + bytes(6))
