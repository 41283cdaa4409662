"""Ways out of a compute node, tried: does it reach what workers have to reach, by the route that its site's file says?

Directly, an HTTPS address is asked for anything at all, which proves its certificate too, and of a ZeroMQ address the first byte
is read, since ZeroMQ speaks first. Through a proxy that passes on by CONNECT, ours on the login node or one of the site, each address
is asked for as a worker does it: many proxies pass on to port 443 alone. Of a SOCKS proxy only itself is looked at.
"""

from __future__ import annotations

import base64
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from urllib.parse import urlsplit

import httpx
import msgspec

from edif_hpc.errors import EdifError
from edif_hpc.slurm.finding import Finding, fail, ok
from edif_hpc.slurm.order import FORWARD_USER, read_forward
from edif_hpc.slurm.site import Site

Dial = Callable[[str], socket.socket]

_CONNECT_S = 10.0
_NO_WAY = "nodes need a way out: ask the site to open it, or choose another `route`"
_NOT_THROUGH = "the proxy has to pass on to this port too: ask the site, or choose another `route`"
_NO_PROXY: Mapping[str, str] = {
    "socks": "is it running, and may nodes reach that port?",
    "connect": "is it running, and may nodes reach that port?",
    "login": "start it on a login node: edif-hpc launcher forward",
}
_LONGEST_ANSWER = 8192


def ways_out(site: Site, urls: Iterable[str]) -> Iterator[Finding]:
    """Each address that has to be reached, by the site's route."""
    if site.route == "direct":
        for url in urls:
            yield _zeromq(url, _connection) if url.startswith("tcp://") else _https(url)
        return
    what = f"route {site.route}"
    try:
        through, secret = _proxy(site)
        _connection(through).close()
    except (EdifError, OSError, ValueError, msgspec.DecodeError) as error:
        yield fail(what, f"{site.proxy or site.forward_file}: {error}", _NO_PROXY[site.route])
        return
    yield ok(what, f"{through} can be reached")
    for url in urls if site.route != "socks" else ():

        def dial(address: str) -> socket.socket:
            return _passed_on(through, secret, address)

        yield _zeromq(url, dial) if url.startswith("tcp://") else _tunnel(url, dial)


def _proxy(site: Site) -> tuple[str, str]:
    """Where the proxy of a route is, and the secret that it wants to hear."""
    if site.proxy and site.route != "login":
        return site.proxy, ""
    told = read_forward(site.forward_file)
    return site.proxy or told.address, told.secret


def _https(url: str) -> Finding:
    what = f"reaches {url}"
    try:
        answer = httpx.get(url, timeout=_CONNECT_S)
    except httpx.HTTPError as error:
        return fail(what, f"no: {str(error) or type(error).__name__}", _NO_WAY)
    # Whatever it says: it is there, and its certificate is good.
    return ok(what, f"in {answer.elapsed.total_seconds() * 1000:.0f} ms")


def _tunnel(url: str, dial: Dial) -> Finding:
    what, parts = f"reaches {url}", urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        dial(f"{parts.hostname}:{port}").close()
    except OSError as error:
        return fail(what, f"no: {error}", _NOT_THROUGH)
    return ok(what, "the proxy passes on")


def _zeromq(url: str, dial: Dial) -> Finding:
    """ZeroMQ speaks first, so its first byte tells a relay from a firewall that accepts and says nothing."""
    what = f"reaches {url}"
    try:
        with dial(url.removeprefix("tcp://")) as link:
            greeting = link.recv(1)
    except (OSError, ValueError) as error:
        return fail(what, f"no: {error}", _NO_WAY if dial is _connection else _NOT_THROUGH)
    if greeting == b"\xff":
        return ok(what, "yes")
    return fail(what, "it accepts, and does not answer as ZeroMQ does", _NO_WAY)


def _connection(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S)


def _passed_on(through: str, secret: str, address: str) -> socket.socket:
    """A connection that a proxy passes on by CONNECT."""
    link = _connection(through)
    try:
        answer = _asked(link, address, secret)
    except OSError:
        link.close()
        raise
    if answer.split()[1:2] != ["200"]:
        link.close()
        raise ConnectionError(f"{through} answered {answer!r} to CONNECT {address}")
    return link


def _asked(link: socket.socket, address: str, secret: str) -> str:
    """The first line of what a proxy answers; what comes after its answer is left to be read."""
    word = base64.b64encode(f"{FORWARD_USER}:{secret}".encode()).decode()
    who = f"Proxy-Authorization: Basic {word}\r\n" if secret else ""
    link.sendall(f"CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n{who}\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n") and len(answer) < _LONGEST_ANSWER:
        byte = link.recv(1)
        if not byte:
            break
        answer += byte
    return answer.split(b"\r\n", 1)[0].decode(errors="replace")
