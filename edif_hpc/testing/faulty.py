"""A TCP proxy with faults, between anything and a real server.

Bytes pass unchanged until a test says otherwise, and what it says holds for connections that are open, too:

    with FaultyProxy(target_port) as proxy:
        proxy.cut_after(3 << 20, times=4)   # the next four connections die after 3 MiB from the client
        proxy.refuse()                      # every connection is reset
        proxy.hang()                        # nothing passes; nobody is told
        proxy.throttle(20 << 20)            # bytes per second, from the client
        proxy.heal()

It runs in a thread of its own, so that tests of threads, loops and processes use it alike.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_CHUNK_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class _Mode:
    refuses: bool = False
    hangs: bool = False
    bytes_per_s: float | None = None


class FaultyProxy:
    """Listens on a port of the loopback (`port`) and passes what comes to `target_port`."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._mode = _Mode()
        self._cuts, self._cut_bytes = 0, 0
        self._open: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faulty-proxy")
        self.port = 0
        self.connections = 0  #: accepted so far
        self.bytes_up = 0  #: passed from clients to the target

    @property
    def url(self) -> str:
        """Its address as HTTP."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # -- faults ----------------------------------------------------------------------------------------------------------

    def heal(self) -> None:
        """Pass everything again."""
        self._mode, self._cuts = _Mode(), 0

    def refuse(self) -> None:
        """Reset all connections, open and new."""
        self._mode = _Mode(refuses=True)
        self._loop.call_soon_threadsafe(self._drop_all)

    def hang(self) -> None:
        """Accept, and pass nothing on."""
        self._mode = _Mode(hangs=True)

    def throttle(self, bytes_per_s: float) -> None:
        """Take so many bytes per second from each client."""
        self._mode = _Mode(bytes_per_s=bytes_per_s)

    def cut_after(self, size_bytes: int, *, times: int) -> None:
        """Reset the next connections when a client has sent so much on one."""
        self._cut_bytes, self._cuts = size_bytes, times

    # -- inside ----------------------------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        self._drop_all()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _drop_all(self) -> None:
        for each in self._open:
            each.cancel()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None:
            return
        self._open.add(task)
        self.connections += 1
        try:
            if not self._mode.refuses:
                await self._pass(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either side went, or a test drops it; both ends see a reset
        finally:
            self._open.discard(task)
            writer.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        ways = [
            asyncio.create_task(self._up(reader, target_writer)),
            asyncio.create_task(self._copy(target_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in ways:
                each.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            target_writer.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = 0
        while data := await reader.read(_CHUNK_BYTES):
            await self._hold(len(data))
            sent += len(data)
            if self._cuts and sent > self._cut_bytes:
                self._cuts -= 1
                return
            self.bytes_up += len(data)
            writer.write(data)
            await writer.drain()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            await self._hold(0)
            writer.write(data)
            await writer.drain()

    async def _hold(self, size_bytes: int) -> None:
        while self._mode.hangs:
            await asyncio.sleep(0.01)
        if self._mode.bytes_per_s is not None:
            await asyncio.sleep(size_bytes / self._mode.bytes_per_s)
