"""How an allocation gets out of its node: to the relay, the object store, and the hub of models.

    direct    nodes reach the relay themselves
    socks     through a SOCKS5 proxy of the site
    connect   through an HTTP proxy of the site that allows CONNECT
    login     through `edif-hpc launcher forward` on a login node, which says in a shared file where it is

Whatever the route, the rest of the pilot and the worker see the same: an endpoint to dial by ZeroMQ, and perhaps the URL of a proxy
for HTTP (`tunnel`). Who the site's proxy is, is asked anew for each connection, so one that has moved is found by trying again; and
its secret stays with the pilot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from edif_hpc.errors import SettingsError
from edif_hpc.pilot.tunnel import Tunnel
from edif_hpc.pilot.upstream import Dial, Proxy, by_connect, by_socks
from edif_hpc.slurm.order import Route, read_forward
from edif_hpc.wire.streams import Address, NoWay, Stream


@dataclass(frozen=True, kw_only=True)
class Way:
    """The way out of this node."""

    proxy: str | None = None  #: URL of the SOCKS proxy for HTTP, if there has to be one
    tunnel: Tunnel | None = None

    async def endpoint(self, relay: str) -> str:
        """Where to dial for the relay's `tcp://` address."""
        if self.tunnel is None:
            return relay
        parts = urlsplit(relay)
        where = Address(parts.hostname or "", parts.port or 0)
        return f"tcp://{await self.tunnel.open_port(where)}"

    @property
    def trouble(self) -> str:
        """Why the last connection could not be made; empty if that is not known here."""
        return self.tunnel.trouble if self.tunnel is not None else ""


@asynccontextmanager
async def way_out(route: Route) -> AsyncIterator[Way]:
    """Have a way out, as long as this lasts."""
    if route.kind == "direct":
        yield Way()
        return
    tunnel = Tunnel(dial_by(route))
    try:
        yield Way(proxy=await tunnel.open_proxy(), tunnel=tunnel)
    finally:
        await tunnel.close()


def dial_by(route: Route) -> Dial:
    """What makes connections through what the route names."""
    if route.kind == "login":
        return _Login(Path(route.forward_file), route.proxy).dial
    proxy = Proxy(address=Address.parse(route.proxy))
    through = by_socks if route.kind == "socks" else by_connect
    return lambda where: through(proxy, where)


@dataclass(frozen=True)
class _Login:
    """The forwarder of a login node; its file is read each time."""

    file: Path
    override: str

    async def dial(self, where: Address) -> Stream:
        return await by_connect(await asyncio.to_thread(self._proxy), where)

    def _proxy(self) -> Proxy:
        try:
            told = read_forward(self.file)
        except FileNotFoundError as error:
            raise NoWay(
                f"no forwarder runs, for there is no {self.file}; start `edif-hpc launcher forward` on a login node"
            ) from error
        except (OSError, SettingsError, msgspec.DecodeError) as error:
            raise NoWay(f"{self.file} does not tell where the forwarder is: {error}") from error
        return Proxy(address=Address.parse(self.override or told.address), secret=told.secret)
