"""A network between a client and a server that can be slow, and that can break.

    with Proxy(port) as proxy:
        ... proxy.url instead of the server's ...
        proxy.upload_bytes_per_s = 100_000     # a thin line; or download_bytes_per_s
        proxy.cut()                            # all connections are reset
        proxy.cut_after(50 << 20)              # the next download breaks after so many bytes
        proxy.cut_uploads(3 << 20, times=4)    # the next four uploads break after so many bytes
        proxy.refuse()                         # every connection is reset, open or new
        proxy.hang()                           # nothing passes, and nobody is told
        proxy.heal()                           # no more refusing, hanging, cutting of uploads

Plain TCP, one thread a direction, nothing is looked into.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_PIECE = 64 << 10
_RESET = struct.pack("ii", 1, 0)  # linger of 0 s: close sends a RST


class Proxy:
    """Forwards connections to a port of the loopback."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._left: int | None = None
        self._cuts, self._cut_bytes = 0, 0
        self._refuses = False
        self._flows = threading.Event()
        self._flows.set()
        self._lock = threading.Lock()
        self.upload_bytes_per_s: float | None = None
        self.download_bytes_per_s: float | None = None
        self.connections = 0
        self.uploaded = 0
        self.downloaded = 0

    @property
    def url(self) -> str:
        """Where to connect."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> int:
        """Reset every connection; returns how many there were."""
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for each in pair:
                _reset(each)
        return len(pairs)

    def cut_after(self, size_bytes: int) -> None:
        """Reset every connection once so many more bytes have been downloaded."""
        with self._lock:
            self._left = size_bytes

    def cut_uploads(self, size_bytes: int, *, times: int) -> None:
        """Reset the next connections on which a client has sent so many bytes."""
        with self._lock:
            self._cuts, self._cut_bytes = times, size_bytes

    def refuse(self) -> None:
        """Reset every connection, also those that come."""
        self._refuses = True
        self.cut()

    def hang(self) -> None:
        """Accept connections, and pass nothing."""
        self._flows.clear()

    def heal(self) -> None:
        """Pass everything again."""
        self._refuses = False
        self.cut_uploads(0, times=0)
        self._flows.set()

    def close(self) -> None:
        """End it."""
        self._closing.set()
        self.heal()
        _reset(self._listener)
        self.cut()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _reset(client)  # as if the relay's machine itself had refused
                continue
            self.connections += 1
            if self._refuses:
                _reset(client)
                _reset(server)
                continue
            with self._lock:
                self._pairs.append((client, server))
            self._spawn(self._up, client, server)
            self._spawn(self._down, server, client)

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        sent = 0
        while data := _read(client):
            self._flows.wait()
            sent += len(data)
            if self._cuts_at(sent):
                _reset(client)
                _reset(server)
                return
            if not _write(server, data):
                break
            self.uploaded += len(data)
            if self.upload_bytes_per_s is not None:
                self._closing.wait(len(data) / self.upload_bytes_per_s)
        _shut(server)

    def _down(self, server: socket.socket, client: socket.socket) -> None:
        while data := _read(server):
            self._flows.wait()
            if not _write(client, data):
                break
            self.downloaded += len(data)
            if self.download_bytes_per_s is not None:
                self._closing.wait(len(data) / self.download_bytes_per_s)
            if self._spent(len(data)):
                self.cut()
        _shut(client)

    def _cuts_at(self, sent: int) -> bool:
        with self._lock:
            if not self._cuts or sent <= self._cut_bytes:
                return False
            self._cuts -= 1
            return True

    def _spent(self, size: int) -> bool:
        with self._lock:
            if self._left is None:
                return False
            self._left -= size
            if self._left > 0:
                return False
            self._left = None
            return True

    def _spawn(self, run: object, *args: object) -> None:
        thread = threading.Thread(target=run, args=args, name="proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def __enter__(self) -> Self:
        self._spawn(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read(source: socket.socket) -> bytes:
    try:
        return source.recv(_PIECE)
    except OSError:  # reset by one side: the end of the stream for the other
        return b""


def _write(target: socket.socket, data: bytes) -> bool:
    try:
        target.sendall(data)
    except OSError:
        return False
    return True


def _shut(target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _reset(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        each.shutdown(socket.SHUT_RDWR)
    each.close()
