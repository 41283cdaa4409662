"""The relay's timer: what must happen although nobody asks.

Each beat drains the socket, then ends leases that expired, ends queued requests past their end date, matches what a failed
commit put back, and tells waiting clients where they stand. Rarely, it deletes results past their retention. When the
loop itself was late (stopped, swapped out), `LeaseClock` moves every deadline, and no worker is called silent in that
beat.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import LATE_LOOP_S
from edif_hpc.errors import EdifError
from edif_hpc.objects.directory import DirectoryStore
from edif_hpc.relay.board import Board
from edif_hpc.relay.broker import Broker
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing
from edif_hpc.relay.worker_gateway import WorkerGateway

_log = logging.getLogger(__name__)

BEAT_S = 0.5
_RARELY_S = 60.0


@dataclass(kw_only=True)
class Scheduler:
    """Calls the sweeps at their time."""

    broker: Broker
    leasing: Leasing
    board: Board
    fleet: Fleet
    gateway: WorkerGateway
    objects: DirectoryStore
    clock: Clock
    ws_grace_s: float
    retention_s: float
    _last_beat: float | None = None
    _last_rare: float | None = None

    async def run(self) -> None:
        """Beat until cancelled."""
        while True:
            await asyncio.sleep(BEAT_S)
            try:
                await self.beat()
            except EdifError as error:  # the store is away: the next beat tries again
                _log.error("a beat failed", extra={"event": "beat_failed", "reason": str(error)})

    async def beat(self) -> None:
        """One round."""
        now = self.clock.monotonic()
        late = self._last_beat is not None and now - self._last_beat > BEAT_S + LATE_LOOP_S
        self._last_beat = now
        self.gateway.drain_socket()
        self.leasing.sweep(BEAT_S)
        if late:
            self.fleet.forgive(now)
        self.gateway.silent(now)
        for request_id, failure in self.broker.overdue(self.ws_grace_s):
            await self.broker.end(request_id, failure)
        self.leasing.match_all()
        self.board.show_positions()
        if self._last_rare is None or now - self._last_rare > _RARELY_S:
            self._last_rare = now
            await self._rarely(now)

    async def _rarely(self, now: float) -> None:
        for allocation_id in self.fleet.lost(now):
            await self.fleet.end(
                allocation_id, cause="lost", detail="neither its pilot nor its worker was heard of"
            )
        await self.broker.retain(self.retention_s)
        await self.objects.sweep()
