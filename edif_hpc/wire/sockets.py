"""The only door to ZeroMQ: CURVE sockets on asyncio, for the relay (`Router`) and for its peers (`Dealer`).

Three habits of libzmq shape this file. A socket's descriptor is edge-triggered: it says that *something* changed, so
each wake-up reads until nothing is left, and looks again after each send. A refused CURVE handshake is silent: the
application's socket sees nothing, so both sides read the socket monitor and turn its events into words. And a peer
may set its own routing id to take another's messages: ids that the ROUTER did not make itself (first byte 0) are
dropped, and who a peer is comes from the User-Id that ZAP attached to the message, its public key.

Keys are Z85 text, 40 characters. One callback gets all messages of a wake-up at once, so that what they cause can
share a commit.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import zmq
import zmq.utils.monitor
import zmq.utils.z85

from edif_hpc.domain.pacing import Rates
from edif_hpc.errors import SettingsError
from edif_hpc.wire.codec import MAX_PEER_FRAME_BYTES, MAX_RELAY_FRAME_BYTES

_log = logging.getLogger(__name__)

_ZAP_DOMAIN = b"edif"
_BATCH = 512
_DRAIN_BATCHES = 64
_HWM = 4096
_ZMTP_BEAT_MS = 10_000
_KEEPALIVE_S = 60
_BACKLOG = 1024
#: A stranger's connection is closed after so long without a key that is known; a peer redials.
HANDSHAKE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class KeyPair:
    """A CURVE key pair in Z85."""

    public: str
    secret: str

    @classmethod
    def generate(cls) -> KeyPair:
        """A new pair from the OS's randomness."""
        public, secret = zmq.curve_keypair()
        return cls(public=public.decode(), secret=secret.decode())

    @classmethod
    def load(cls, path: Path) -> KeyPair:
        """Read a pair that `save` wrote; refuses a file that others may read."""
        if path.stat().st_mode & 0o077:
            raise SettingsError(
                f"{path} holds a private key and others may read it; chmod 600 {path}"
            )
        public, _, secret = path.read_text().strip().partition(" ")
        if len(public) != len(secret) or len(secret) != 40:
            raise SettingsError(
                f"{path} is not a key file; make a new one with `edif-hpc relay init`"
            )
        return cls(public=public, secret=secret)

    def save(self, path: Path) -> None:
        """Write it for the owner alone."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            os.fchmod(fd, 0o600)  # of a file that was there before, too
            file.write(f"{self.public} {self.secret}\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    """One message as it came: `route` answers it, `key` is the public key of the peer that sent it."""

    route: bytes
    key: str
    frame: bytes


class LinkEvent(StrEnum):
    """What the socket monitor saw of a connection."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    REFUSED = "refused"  #: ZAP turned the key away; libzmq does not try again
    MISMATCH = "mismatch"  #: wrong server key, no CURVE, or not a ZeroMQ peer


_EVENTS: Mapping[int, LinkEvent] = {
    zmq.EVENT_HANDSHAKE_SUCCEEDED: LinkEvent.CONNECTED,
    zmq.EVENT_DISCONNECTED: LinkEvent.DISCONNECTED,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: LinkEvent.REFUSED,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: LinkEvent.MISMATCH,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: LinkEvent.MISMATCH,
}


class _Pump:
    """Reads one socket on the running loop, in batches."""

    def __init__(
        self, socket: zmq.Socket[bytes], handle: Callable[[list[list[zmq.Frame]]], None]
    ) -> None:
        self._socket = socket
        self._handle = handle
        self._loop = asyncio.get_running_loop()
        self._scheduled = False
        self._paused = False
        self._fd = socket.fileno()
        self._loop.add_reader(self._fd, self.drain)
        self.again()

    def drain(self) -> int:
        """Hand over what has come; return how many messages that were."""
        self._scheduled = False
        if self._paused:
            return 0
        batch: list[list[zmq.Frame]] = []
        while len(batch) < _BATCH:
            try:
                batch.append(self._socket.recv_multipart(zmq.NOBLOCK, copy=False))
            except zmq.Again:
                break
        try:
            if batch:
                self._handle(batch)
        finally:  # whatever became of these, the edge that announced the rest has passed
            self.again()
        return len(batch)

    def again(self) -> None:
        """Look once more soon: a send may have swallowed the edge that announced a message."""
        if self._scheduled or self._paused:
            return
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            self._scheduled = True
            self._loop.call_soon(self.drain)

    def pause(self) -> None:
        """Stop reading, for good."""
        if not self._paused:
            self._paused = True
            self._loop.remove_reader(self._fd)

    def close(self, *, linger_ms: int = 0) -> None:
        """Stop reading and close the socket; what is queued may still leave for `linger_ms`."""
        self.pause()
        self._socket.close(linger=linger_ms)


def _monitor(socket: zmq.Socket[bytes], tell: Callable[[LinkEvent, str], None]) -> _Pump:
    watch: zmq.Socket[bytes] = socket.get_monitor_socket(sum(_EVENTS))

    def handle(batch: list[list[zmq.Frame]]) -> None:
        for frames in batch:
            event = zmq.utils.monitor.parse_monitor_message(
                [bytes(frame.buffer) for frame in frames]
            )
            kind = _EVENTS.get(event["event"])
            if kind is not None:
                tell(kind, event["endpoint"].decode(errors="replace"))

    return _Pump(watch, handle)


def _common(socket: zmq.Socket[bytes], limit_bytes: int) -> None:
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, limit_bytes + 4096)
    socket.setsockopt(zmq.SNDHWM, _HWM)
    socket.setsockopt(zmq.RCVHWM, _HWM)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _ZMTP_BEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, 6 * _ZMTP_BEAT_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_S)
    socket.setsockopt(zmq.IPV6, 1)


class _Gate:
    """ZAP (ZeroMQ RFC 27): libzmq asks about the key of each handshake, over a socket inside the process.

    What it answers as user id is what every message of that connection carries as `User-Id`.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], known: Callable[[str], bool]
    ) -> None:
        self._known = known
        self._socket = context.socket(zmq.ROUTER)
        self._socket.bind("inproc://zeromq.zap.01")
        self._pump = _Pump(self._socket, self._asked)

    def close(self) -> None:
        """Answer nobody any more."""
        self._pump.close()

    def _asked(self, batch: list[list[zmq.Frame]]) -> None:
        for frames in batch:
            asked = [bytes(each.buffer) for each in frames]
            route, end, version, request, domain, _, _, mechanism, *credentials = asked
            name = _name_of(credentials) if (domain, mechanism) == (_ZAP_DOMAIN, b"CURVE") else ""
            known = bool(name) and self._known(name)
            verdict = [b"200", b"OK", name.encode()] if known else [b"400", b"unknown key", b""]
            self._socket.send_multipart([route, end, version, request, *verdict, b""])
            self._pump.again()


def _name_of(credentials: list[bytes]) -> str:
    """A public key as its peer's record has it."""
    return zmq.utils.z85.encode(credentials[0]).decode() if len(credentials) == 1 else ""


class Router:
    """The relay's socket: binds, lets known keys in, names the sender of each message."""

    def __init__(
        self,
        *,
        bind: str,
        keys: KeyPair,
        known: Callable[[str], bool],
        on_batch: Callable[[list[Incoming]], None],
        handshake_s: float = HANDSHAKE_S,
    ) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._gate = _Gate(self._context, known)
        self._socket = self._context.socket(zmq.ROUTER)
        _common(self._socket, MAX_PEER_FRAME_BYTES)
        self._socket.setsockopt(zmq.IPV6, int("[" in bind))
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, int(handshake_s * 1000))
        self._socket.setsockopt(zmq.BACKLOG, _BACKLOG)
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret.encode())
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public.encode())
        self._socket.setsockopt(zmq.ZAP_DOMAIN, _ZAP_DOMAIN)
        self.refusals = 0
        self._complaints = Rates(rate=1.0)
        self._on_batch = on_batch
        self._watch = _monitor(self._socket, self._saw)
        self._pump = _Pump(self._socket, self._receive)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise SettingsError(
                f"cannot listen for workers on {bind}: {error}; choose another address or port"
            ) from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def send(self, route: bytes, frame: bytes) -> bool:
        """Queue a message for a connection; False if it is gone or does not read."""
        if self._socket.closed:
            return False
        try:
            self._socket.send_multipart((route, frame), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        self._pump.again()
        return True

    def drain(self) -> None:
        """Hand over what lies unread in the socket, now; a peer that floods it cannot hold us."""
        for _ in range(_DRAIN_BATCHES):
            if not self._pump.drain():
                return

    def stop_reading(self) -> None:
        """Hand over nothing any more; what is sent still goes out."""
        self._pump.pause()

    def close(self) -> None:
        """Close the socket and everything that watches it."""
        self._socket.disable_monitor()
        self._watch.close()
        self._pump.close()
        self._gate.close()
        self._context.destroy(linger=0)

    def _receive(self, batch: list[list[zmq.Frame]]) -> None:
        incoming = []
        for frames in batch:
            route = bytes(frames[0].buffer)
            if len(frames) != 2 or route[:1] != b"\0":
                _log.warning(
                    "dropped a message", extra={"event": "wire_dropped", "frames": len(frames)}
                )
                continue
            incoming.append(
                Incoming(
                    route=route, key=str(frames[1].get("User-Id")), frame=bytes(frames[1].buffer)
                )
            )
        if incoming:
            self._on_batch(incoming)

    def _saw(self, event: LinkEvent, endpoint: str) -> None:
        if event in (LinkEvent.REFUSED, LinkEvent.MISMATCH):
            self.refusals += 1
            # Strangers may knock as often as they like; the log has about a line a second for them.
            told, _ = self._complaints.take(event, asyncio.get_running_loop().time())
            if told:
                _log.warning(
                    "a peer's handshake failed",
                    extra={
                        "event": "handshake_failed",
                        "kind": str(event),
                        "endpoint": endpoint,
                        "so_far": self.refusals,
                    },
                )


class Dealer:
    """A peer's socket: dials the relay. `reconnect` makes a new connection, hence a new routing id."""

    def __init__(
        self,
        *,
        endpoint: str,
        server_key: str,
        keys: KeyPair,
        on_batch: Callable[[list[bytes]], None],
        on_event: Callable[[LinkEvent, str], None],
    ) -> None:
        self._endpoint, self._server_key, self._keys = endpoint, server_key, keys
        self._on_batch, self._on_event = on_batch, on_event
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._open()

    def send(self, frame: bytes) -> bool:
        """Queue a message; False if the queue is full, that is, the relay has been away for long."""
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._pump.again()
        return True

    def reconnect(self) -> None:
        """Drop the connection with all that is queued, and dial again."""
        self._shut()
        self._open()

    async def close(self) -> None:
        """Close after what is queued has left, for at most a second."""
        self._shut(linger_ms=1000)
        await asyncio.to_thread(self._context.term)

    def _open(self) -> None:
        self._socket = self._context.socket(zmq.DEALER)
        _common(self._socket, MAX_RELAY_FRAME_BYTES)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.setsockopt(zmq.CURVE_SERVERKEY, self._server_key.encode())
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.public.encode())
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, self._keys.secret.encode())
        self._watch = _monitor(self._socket, self._on_event)
        self._pump = _Pump(self._socket, self._receive)
        try:
            self._socket.connect(self._endpoint)
        except zmq.ZMQError as error:
            self._shut()
            self._context.term()
            raise SettingsError(
                f"{self._endpoint!r} is not an address to dial: {error}; the relay's worker_endpoint "
                "has the form tcp://HOST:PORT"
            ) from error

    def _shut(self, *, linger_ms: int = 0) -> None:
        self._socket.disable_monitor()
        self._watch.close()
        self._pump.close(linger_ms=linger_ms)

    def _receive(self, batch: list[list[zmq.Frame]]) -> None:
        self._on_batch([bytes(frames[0].buffer) for frames in batch if len(frames) == 1])
