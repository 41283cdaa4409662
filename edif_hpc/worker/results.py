"""Results that the relay has not acknowledged: their files on scratch, and their questions for URLs.

A file is kept until the relay has answered the request's `Done`, so a relay that is away, or asks for the parts again, costs
nothing but time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import HEARTBEAT_S
from edif_hpc.wire import messages as m
from edif_hpc.worker.transfer import Transfer
from edif_hpc.worker.uploading import Uploading, UploadRules

_RULES = UploadRules(part_bytes=8 << 20, patience_s=3600.0)


class Results:
    """All results of a worker. `send` puts a message on the wire."""

    def __init__(
        self, *, transfer: Transfer, send: Callable[[m.Message], None], clock: Clock
    ) -> None:
        self._transfer, self._send, self._clock = transfer, send, clock
        self._rules, self._heartbeat_s = _RULES, HEARTBEAT_S
        self._files: dict[tuple[str, int], Path] = {}
        self._asked: dict[tuple[str, int, int], tuple[m.Need, asyncio.Future[m.Parts]]] = {}

    def welcomed(self, welcome: m.Welcome) -> None:
        """The relay said how it wants them."""
        self._rules = UploadRules(part_bytes=welcome.part_bytes, patience_s=welcome.patience_s)
        self._heartbeat_s = welcome.heartbeat_s
        for need, _ in self._asked.values():  # what was asked on another connection may be lost
            self._send(need)

    def uploading(self, request: str, attempt: int) -> Uploading:
        """The way up of one result."""

        async def ask(first: int, count: int) -> m.Parts:
            return await self._ask(request, attempt, first, count)

        return Uploading(transfer=self._transfer, ask=ask, rules=self._rules, clock=self._clock)

    def arrived(self, parts: m.Parts) -> None:
        """URLs came."""
        _, future = self._asked.get((parts.request, parts.attempt, parts.first), (None, None))
        if future is not None and not future.done():
            future.set_result(parts)

    def keep(self, request: str, attempt: int, file: Path) -> None:
        """Remember the file of a result."""
        self._files[request, attempt] = file

    def file(self, request: str, attempt: int) -> Path:
        """The file of a result that is kept."""
        return self._files[request, attempt]

    def settled(self, request: str, attempt: int) -> None:
        """The relay has answered: its file may go."""
        source = self._files.pop((request, attempt), None)
        if source is not None:
            source.unlink(missing_ok=True)

    async def _ask(self, request: str, attempt: int, first: int, count: int) -> m.Parts:
        key = (request, attempt, first)
        need = m.Need(request=request, attempt=attempt, first=first, count=count)
        future: asyncio.Future[m.Parts] = asyncio.get_running_loop().create_future()
        self._asked[key] = (need, future)
        try:
            while not future.done():
                self._send(need)
                # A question or its answer may be lost, so it is asked until it is answered.
                await asyncio.wait({future}, timeout=2 * self._heartbeat_s)
        finally:
            self._asked.pop(key, None)
        return future.result()
