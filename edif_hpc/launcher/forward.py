"""The forwarder: lets compute nodes that reach only the login node reach the relay, and nothing else.

It is an HTTP proxy for CONNECT alone. It passes on to the relay's own addresses (HTTPS, ZeroMQ, and the object store that workers
put results into, if there is one), which it asks the relay for, and answers 403 for any other. TLS and CURVE go through, so it
sees nothing of what passes, and keeps nothing.

Anybody on the cluster can connect to a port of a login node. So whoever wants to be passed on names a secret, new at every start,
that lies with the address in the site's shared `state_dir` (`forward.json`, mode 0600), where the pilots look it up for every
connection. A forwarder that was started anew, perhaps on another login node, is found by that.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import h11

from edif_hpc.errors import EdifError, SettingsError
from edif_hpc.slurm.order import FORWARD_USER, ForwardFile, read_forward, write_forward
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.submit import check_folder
from edif_hpc.wire.streams import Address, NoWay, Passage, Stream, dial

_log = logging.getLogger(__name__)

REFRESH_S: Final = 60.0
AGAIN_S: Final = 5.0
_PORTS: Final = {"https": 443, "http": 80}
_START_S: Final = 30.0
_WORDS: Final = {
    400: "Bad Request",
    403: "Forbidden",
    405: "Method Not Allowed",
    407: "Proxy Authentication Required",
    502: "Bad Gateway",
}


class Relay(Protocol):
    """The relay as it is seen from here."""

    url: str

    def get(self, path: str) -> Any:
        """The JSON of a GET."""


@dataclass(kw_only=True)
class Forwarder:
    """The forwarder of one site. `listen` is an address of this machine that compute nodes reach."""

    site: Site
    relay: Relay
    listen: Address
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    refresh_s: float = REFRESH_S
    allowed: frozenset[Address] = frozenset()
    _stop: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, ready: Callable[[Address], None]) -> None:
        """Serve until `stop`.

        Raises:
            SettingsError: it cannot listen there.
        """
        self.allowed = frozenset({address_of(self.relay.url)})
        passage = Passage(self._lead)
        try:
            address = await passage.listen(self.listen)
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {self.listen}: {error.strerror or error}; name an address of this machine that compute "
                "nodes reach (--listen HOST:PORT)"
            ) from error
        told = ForwardFile(address=str(address), secret=self.secret)
        try:
            check_folder(self.site.state_dir)
            write_forward(self.site.forward_file, told)
            ready(address)
            await self._until_stopped()
        finally:
            await passage.close()
            self._withdraw(told)

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()

    async def _until_stopped(self) -> None:
        following = asyncio.create_task(self._follow_relay(), name="follow-relay")
        stopping = asyncio.create_task(self._stop.wait(), name="stop")
        await asyncio.wait({following, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()  # it does not end but by a fault
        following.cancel()

    async def _follow_relay(self) -> None:
        """Ask the relay for its addresses now and again; while it is away, those that are known stand."""
        pause_s = AGAIN_S
        while True:
            try:
                answer = await asyncio.to_thread(self.relay.get, "/api/launcher/addresses")
            except EdifError as error:
                extra = {"event": "addresses_unknown"}
                _log.warning("the relay did not tell its addresses: %s", error, extra=extra)
            else:
                pause_s = self.refresh_s
                self.allowed = addresses_of([self.relay.url, *answer["urls"]])
            await asyncio.sleep(pause_s)

    def _withdraw(self, told: ForwardFile) -> None:
        """Another one may have taken over."""
        with suppress(FileNotFoundError):
            if read_forward(self.site.forward_file) == told:
                self.site.forward_file.unlink()

    # -- one connection ------------------------------------------------------------------------------------------------

    async def _lead(self, client: Stream) -> tuple[Stream, str]:
        where = await self._wanted(client)
        if where not in self.allowed:
            known = ", ".join(sorted(map(str, self.allowed)))
            raise _refuse(
                client, 403, f"this passes on to {known} and nowhere else, not to {where}"
            )
        try:
            server = await dial(where)
        except NoWay as error:
            raise _refuse(client, 502, str(error)) from error
        client.writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        return server, str(where)

    async def _wanted(self, client: Stream) -> Address:
        try:
            request = _parsed(await client.reader.readuntil(b"\r\n\r\n"))
        except (asyncio.LimitOverrunError, h11.RemoteProtocolError) as error:
            raise _refuse(client, 400, f"this is no request of HTTP: {error}") from error
        if not self._knows(request):
            raise _refuse(client, 407, "this needs the secret in the site's forward.json")
        if request.method != b"CONNECT":
            raise _refuse(client, 405, "this serves CONNECT alone")
        try:
            return Address.parse(request.target.decode("ascii", errors="replace"))
        except EdifError as error:
            raise _refuse(client, 400, str(error)) from error

    def _knows(self, request: h11.Request) -> bool:
        said = dict(request.headers).get(b"proxy-authorization", b"")
        right = b"Basic " + base64.b64encode(f"{FORWARD_USER}:{self.secret}".encode())
        return secrets.compare_digest(said, right)


def address_of(url: str) -> Address:
    """Where a URL of HTTP or ZeroMQ leads."""
    parts = urlsplit(url)
    port = parts.port or _PORTS.get(parts.scheme)
    if not parts.hostname or port is None:
        raise SettingsError(f"{url!r} has no host and port to forward to")
    return Address(parts.hostname, port)


def addresses_of(urls: Iterable[str]) -> frozenset[Address]:
    """Where they lead."""
    return frozenset(map(address_of, urls))


def own_host() -> str:
    """The name of this machine, if it is one that others can use.

    Raises:
        SettingsError: it means this machine itself.
    """
    name = socket.getfqdn()
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(
            f"this machine's name {name!r} leads nowhere ({error}); name an address (--listen)"
        ) from error
    number = found[0][4][0]
    if str(number).startswith("127.") or number == "::1":
        raise SettingsError(
            f"this machine's name {name!r} means {number}, which compute nodes cannot reach; name an address that they "
            "can (--listen HOST:PORT)"
        )
    return name


def serve(forwarder: Forwarder, *, tell: Callable[[str], None]) -> None:
    """Run it until SIGTERM or SIGINT.

    Raises:
        SettingsError: it cannot listen there.
    """

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, forwarder.stop)
        await forwarder.run(lambda at: tell(f"forwarding from {at} to {forwarder.relay.url}"))

    asyncio.run(run())


@contextmanager
def beside(forwarder: Forwarder) -> Iterator[Address]:
    """Run it in a thread, for as long as something else runs; gives the address where it listens.

    Raises:
        SettingsError: it cannot listen there.
    """
    begun: Future[Address] = Future()
    loop = asyncio.new_event_loop()

    def serve() -> None:
        try:
            loop.run_until_complete(forwarder.run(begun.set_result))
        except EdifError as error:
            if begun.done():
                raise
            begun.set_exception(error)

    thread = threading.Thread(target=serve, name="forward")
    thread.start()
    try:
        yield begun.result(_START_S)
    finally:
        loop.call_soon_threadsafe(forwarder.stop)
        thread.join()
        loop.close()


def _parsed(head: bytes) -> h11.Request:
    parser = h11.Connection(h11.SERVER)
    parser.receive_data(head)
    event = parser.next_event()
    if not isinstance(event, h11.Request):
        raise h11.RemoteProtocolError(f"{head[:40]!r}")
    return event


def _refuse(client: Stream, status: int, why: str) -> NoWay:
    """Say no, and return what to raise."""
    lines = [f"HTTP/1.1 {status} {_WORDS[status]}"]
    if status == 407:
        lines.append('Proxy-Authenticate: Basic realm="edif-hpc"')
    body = f"{why}\n".encode()
    lines += ["Content-Type: text/plain; charset=utf-8", f"Content-Length: {len(body)}"]
    lines += ["Connection: close", "", ""]
    client.writer.write("\r\n".join(lines).encode() + body)
    return NoWay(f"{status}: {why}")
