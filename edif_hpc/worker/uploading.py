"""A result's way up: in parts, from a file that may still be growing, until the store has them all.

While the executor writes, `grew` says how many bytes are final, and whole parts go up at once, a few at a time; `finish`
says that the file is complete and waits for the rest. So compressing and sending overlap, and memory is bounded by a few
pieces of the parts in flight, whatever the size of the result.

A failed part is tried again, with a new URL and a growing pause, since the reason may be anything from an expired URL to a
full bucket. Time in which the relay itself is away does not count: nobody can do anything then, and the result waits
here. When the store has taken nothing for `patience_s` although the relay gave URLs, the result is given up.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.clock import Clock
from edif_hpc.errors import EdifError, Unavailable
from edif_hpc.wire import messages as m
from edif_hpc.worker.transfer import Refused, Transfer

IN_FLIGHT = 3
URLS_AT_ONCE = 16
PIECE_BYTES = 1 << 20
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0

#: Asks the relay for URLs of `count` parts from `first` on; returns when it has answered.
Ask = Callable[[int, int], Awaitable[m.Parts]]


class StoreGivenUp(EdifError):
    """The store has taken nothing for too long."""

    code = "store_given_up"


async def _pieces(fd: int, start: int, size_bytes: int) -> AsyncIterator[bytes]:
    stop = start + size_bytes
    for position in range(start, stop, PIECE_BYTES):
        yield await asyncio.to_thread(os.pread, fd, min(PIECE_BYTES, stop - position), position)


@dataclass(frozen=True, kw_only=True)
class UploadRules:
    """What the relay says: how long a part is, and how long to be patient."""

    part_bytes: int
    patience_s: float


class Uploading:
    """One result on its way up."""

    def __init__(self, *, transfer: Transfer, ask: Ask, rules: UploadRules, clock: Clock) -> None:
        self._transfer, self._ask, self._rules, self._clock = transfer, ask, rules, clock
        self._source: Path | None = None
        self._final_bytes = 0
        self._complete = False
        self._next = 1
        self._urls: dict[int, str] = {}
        self._asked_to = 0
        self._asking = asyncio.Lock()
        self._news = asyncio.Event()
        self._etags: dict[int, str] = {}
        self._failing_since: float | None = None
        self._carriers: list[asyncio.Task[None]] = []

    def grew(self, source: Path, final_bytes: int) -> None:
        """So many bytes of the file will not change any more."""
        self._source, self._final_bytes = source, final_bytes
        if final_bytes >= self._rules.part_bytes:
            self._carry()
        self._news.set()

    async def finish(self, source: Path, size_bytes: int) -> list[m.Part]:
        """The file is complete; returns its parts when the store has them.

        Raises:
            StoreGivenUp: the store takes nothing.
        """
        self._source, self._final_bytes, self._complete = source, size_bytes, True
        self._carry()
        self._news.set()
        try:
            await asyncio.gather(*self._carriers)
        finally:
            await self.stop()
        return [m.Part(number=number, etag=etag) for number, etag in sorted(self._etags.items())]

    @property
    def sent(self) -> int:
        """Bytes of the file that the store has."""
        return min(len(self._etags) * self._rules.part_bytes, self._final_bytes)

    async def stop(self) -> None:
        """Stop sending; what the store has of it is the relay's to throw away."""
        for each in self._carriers:
            each.cancel()
        await asyncio.gather(*self._carriers, return_exceptions=True)
        self._carriers = []

    # -- inside --------------------------------------------------------------------------------------------------------

    def _carry(self) -> None:
        if not self._carriers:
            self._carriers = [
                asyncio.create_task(self._carrier(), name=f"upload-{seat}")
                for seat in range(IN_FLIGHT)
            ]

    async def _carrier(self) -> None:
        while (number := await self._take()) is not None:
            self._etags[number] = await self._put(number)

    async def _take(self) -> int | None:
        """The next part, once it is final; None when there is none left."""
        while not self._complete and self._final_bytes < self._next * self._rules.part_bytes:
            self._news.clear()
            await self._news.wait()
        if self._complete and self._next > self._count:
            return None
        number, self._next = self._next, self._next + 1
        return number

    @property
    def _count(self) -> int:
        return max(1, -(-self._final_bytes // self._rules.part_bytes))

    async def _put(self, number: int) -> str:
        pause, refused = _FIRST_PAUSE_S, False
        while True:
            try:
                url = await self._url(number)
                etag = await self._send(url, number)
            except Unavailable as error:
                self._check_patience(error)
                if isinstance(error, Refused) and not refused:
                    refused = True  # it may just have expired: at once again, with another URL
                else:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)
            else:
                self._failing_since = None
                return etag

    async def _send(self, url: str, number: int) -> str:
        if self._source is None:
            raise ValueError("no part can be due before there is a file")
        start = (number - 1) * self._rules.part_bytes
        fd = os.open(self._source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            left = os.fstat(fd).st_size - start
            size = max(0, min(self._rules.part_bytes, left))
            return await self._transfer.put(url, _pieces(fd, start, size), size)
        finally:
            os.close(fd)

    async def _url(self, number: int) -> str:
        """A URL, each used once. Raises `Unavailable` if the relay has none to give."""
        async with self._asking:
            if number not in self._urls:
                asked_at = self._clock.monotonic()
                again = number <= self._asked_to
                parts = await self._ask(number, 1 if again else URLS_AT_ONCE)
                if self._failing_since is not None:
                    self._failing_since += self._clock.monotonic() - asked_at
                if parts.refusal or not parts.urls:
                    raise Unavailable(parts.refusal or "the relay has no URLs to give")
                self._urls.update(enumerate(parts.urls, start=number))
                self._asked_to = max(self._asked_to, number + len(parts.urls) - 1)
            return self._urls.pop(number)

    def _check_patience(self, error: Unavailable) -> None:
        now = self._clock.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        tried_s = now - self._failing_since
        if tried_s > self._rules.patience_s:
            raise StoreGivenUp(
                f"the code has run, but its result could not be stored in {tried_s:.0f} s of trying: {error}. "
                "Tell the operator, and send it again when the store works"
            )
