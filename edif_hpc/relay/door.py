"""Who comes in: the accept loop of the HTTP server, and how many connections each address may hold.

asyncio's own server would tell us of a TLS connection only once its handshake is over, and strangers who begin none could fill
the process with sockets that nobody counts. So the door accepts for itself: a connection is counted first, by whom it comes
from (`origin`), and then given to TLS and the protocol, which have a deadline. When the process has no descriptors left, a
spare one is used to take a connection and close it, so that the queue in the kernel moves and the loop does not spin.

What is refused is logged once a second at most for each reason: a flood must not become one of the log.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource
import socket
import ssl
from collections import Counter
from collections.abc import Callable

from edif_hpc.domain.pacing import Rates, Shares, origin
from edif_hpc.errors import TooMany
from edif_hpc.relay.answers import canned
from edif_hpc.relay.guard import Terms, Visit
from edif_hpc.settings import RelaySettings

_log = logging.getLogger(__name__)

Protocols = Callable[[Visit, Terms], asyncio.Protocol]

_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_GONE = {errno.ECONNABORTED, errno.EPROTO, errno.ENETDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH}
_RESPITE_S = 0.1
_DESCRIPTORS = 1 << 16


class Complaints:
    """Log lines about strangers, each reason at most once a second or so; what was left out is counted."""

    def __init__(self) -> None:
        self._rates = Rates(rate=1.0)
        self._left_out: Counter[str] = Counter()

    def tell(self, reason: str, address: str) -> None:
        """Somebody was refused."""
        may, _ = self._rates.take(reason, asyncio.get_running_loop().time())
        if not may:
            self._left_out[reason] += 1
            return
        extra = {"event": "stranger_refused", "reason": reason, "address": address}
        _log.info("refused", extra={**extra, "more": self._left_out.pop(reason, 0)})


class Door:
    """The accept loop."""

    def __init__(
        self,
        listener: socket.socket,
        settings: RelaySettings,
        protocols: Protocols,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._listener, self._protocols, self._tls = listener, protocols, tls
        self._limit = room_for(settings.max_connections)
        one = self._limit if settings.behind_proxy else settings.max_connections_per_address
        self._held = Shares(limit=one)
        self._open = 0
        self._complaints = Complaints()
        self._head_s = settings.head_s
        self._terms = Terms(
            head_s=settings.head_s,
            stall_s=settings.stall_s,
            slowest_rate=float(settings.slowest_rate),
            tell=self._complaints.tell,
        )
        self._spare: int | None = _spare()
        self._entering: set[asyncio.Task[None]] = set()

    @property
    def open(self) -> int:
        """How many connections are open."""
        return self._open

    async def run(self) -> None:
        """Accept until cancelled."""
        self._listener.settimeout(0)
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    connection, address = await loop.sock_accept(self._listener)
                except OSError as error:
                    if error.errno in _FULL:
                        await self._shed()
                    elif error.errno not in _GONE:
                        raise
                else:
                    self._admit(connection, origin(str(address[0])))
        finally:
            for each in self._entering:
                each.cancel()
            self._give_spare()

    def _admit(self, connection: socket.socket, source: str) -> None:
        if self._open >= self._limit:
            self._refuse(connection, source, f"{self._limit} connections are open here")
        elif not self._held.take(source):
            limit = self._held.limit
            self._refuse(
                connection,
                source,
                f"{limit} connections are open from your address (max_connections_per_address)",
            )
        else:
            self._open += 1
            visit = Visit(origin=source, leaving=self._left)
            task = asyncio.create_task(self._enter(connection, visit), name=f"door {source}")
            self._entering.add(task)
            task.add_done_callback(self._entering.discard)

    async def _enter(self, connection: socket.socket, visit: Visit) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(
                lambda: self._protocols(visit, self._terms),
                connection,
                ssl=self._tls,
                ssl_handshake_timeout=self._head_s if self._tls is not None else None,
            )
        except (OSError, ssl.SSLError):  # also a handshake that took too long
            self._complaints.tell("handshake", visit.origin)
            visit.leave()
            connection.close()
        except BaseException:
            visit.leave()
            connection.close()
            raise

    def _left(self, source: str) -> None:
        self._open -= 1
        self._held.give(source)

    def _refuse(self, connection: socket.socket, source: str, why: str) -> None:
        """Say it, if it can be said at once and in the clear."""
        self._complaints.tell("connections", source)
        with connection:
            if self._tls is None:
                connection.settimeout(0)
                error = TooMany(f"{why}; close some, or try again later", retry_s=10.0)
                try:
                    connection.send(canned(error, secure=False))
                    connection.shutdown(socket.SHUT_WR)
                except OSError as gone:
                    _log.debug("it did not wait: %s", gone)

    async def _shed(self) -> None:
        """No descriptor is left: take one connection off the kernel's queue and drop it."""
        self._complaints.tell("descriptors", "")
        self._give_spare()
        try:
            self._listener.accept()[0].close()
            self._spare = _spare()
        except OSError as error:  # the client has gone, or somebody else took the descriptor
            _log.debug("nothing was shed: %s", error)
            await asyncio.sleep(_RESPITE_S)

    def _give_spare(self) -> None:
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None


def room_for(connections: int) -> int:
    """How many connections this process may hold: as many as were asked for, and half of its descriptors at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = connections if soft == resource.RLIM_INFINITY else min(connections, soft // 2)
    if room < connections:
        _log.warning(
            "only %d connections: this process may have %d descriptors (ulimit -n)",
            room,
            soft,
            extra={"event": "few_descriptors", "limit": soft, "connections": room},
        )
    return room


def raise_descriptor_limit() -> None:
    """Take the descriptors that this process may have; many systems give 1024 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _spare() -> int:
    return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
