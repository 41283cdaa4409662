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
from edif_hpc.objects.base import ObjectStore
from edif_hpc.relay.board import Board
from edif_hpc.relay.broker import Broker
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.leasing import Leasing
from edif_hpc.relay.worker_gateway import WorkerGateway

_log = logging.getLogger(__name__)

BEAT_S = 0.5
_RARELY_S = 60.0
_SWEEP_S = 3600.0
#: What no request knows of is left alone for so long: longer than any result is on its way.
_MARGIN_S = 2 * 24 * 3600.0


@dataclass(kw_only=True)
class Scheduler:
    """Calls the sweeps at their time."""

    broker: Broker
    leasing: Leasing
    board: Board
    fleet: Fleet
    gateway: WorkerGateway
    objects: ObjectStore
    clock: Clock
    ws_grace_s: float
    retention_s: float
    _last_beat: float | None = None
    _last_rare: float | None = None
    _last_sweep: float | None = None
    _tidying: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Beat until cancelled."""
        try:
            while True:
                await self._beat_or_tell()  # at once, since lateness is measured from beat to beat
                await asyncio.sleep(BEAT_S)
        finally:
            if self._tidying is not None:
                self._tidying.cancel()

    async def _beat_or_tell(self) -> None:
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
        self.board.tell()
        if self._last_rare is None or now - self._last_rare > _RARELY_S:
            self._last_rare = now
            await self._rarely(now)

    async def _rarely(self, now: float) -> None:
        for allocation_id in self.fleet.lost(now):
            await self.fleet.end(
                allocation_id, cause="lost", detail="neither its pilot nor its worker was heard of"
            )
        if self._tidying is None or self._tidying.done():
            self._tidying = asyncio.create_task(self._tidy(now), name="tidy")

    async def _tidy(self, now: float) -> None:
        """Delete what is due; apart from the beat, since a store may be slow."""
        try:
            await self.broker.retain(self.retention_s)
            if self._last_sweep is None or now - self._last_sweep > _SWEEP_S:
                self._last_sweep = now
                wall = self.clock.wall()
                await self.objects.sweep(
                    objects_before=wall - self.retention_s - _MARGIN_S,
                    uploads_before=wall - _MARGIN_S,
                )
        except EdifError as error:
            _log.error("not tidied", extra={"event": "tidy_failed", "reason": str(error)})
