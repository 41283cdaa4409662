"""The pilot's link to the relay: a greeting, heartbeats, reports about the worker, the successor's ticket, a goodbye.

Nothing here must not be lost: a report that the relay misses only means that it learns of a dead worker by an expired
lease. So the link sends what it can and greets anew whenever the relay does not know it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from typing import Protocol

import msgspec

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import HEARTBEAT_S
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.session import SILENCE_BEATS
from edif_hpc.wire.sockets import Dealer, KeyPair, LinkEvent
from edif_hpc.wire.turns import UNKNOWN_SESSION

_log = logging.getLogger(__name__)


class Job(Protocol):
    """What the scheduler says of this allocation's job."""

    id: str | None
    restarts: int

    @property
    def left_s(self) -> float | None:
        """How much of its walltime is left."""


class PilotLink:
    """One pilot's connection. Made on a running loop."""

    def __init__(
        self,
        *,
        endpoint: str,
        server_key: str,
        keys: KeyPair,
        clock: Clock,
        job: Job,
    ) -> None:
        self._clock, self._job = clock, job
        self._orders: asyncio.Queue[m.Order] = asyncio.Queue()
        self._turn = 0
        self._nonce = secrets.token_hex(8)
        self._refused = asyncio.Event()
        self._parted = False
        self._heard_at = clock.monotonic()
        self._dealer = Dealer(
            endpoint=endpoint,
            server_key=server_key,
            keys=keys,
            on_batch=self._received,
            on_event=self._saw,
        )
        self._hello()
        self._beating = asyncio.create_task(self._beat(), name="pilot-beat")

    @property
    def refused(self) -> bool:
        """Whether the relay no longer knows this allocation."""
        return self._refused.is_set()

    async def until_refused(self) -> None:
        """Wait until the relay turns this pilot away."""
        await self._refused.wait()

    def report(self, event: str, detail: str, *, nonce: str) -> None:
        """Tell the relay about the worker's process that greets with this nonce."""
        self._hello()  # a relay that was started anew since our last beat does not know us
        self._send(m.Report(event=event, detail=detail[-8000:], nonce=nonce))

    async def ask(self, message: m.Revive | m.Ordered, *, within_s: float) -> m.Order | None:
        """Send what is answered with an `Order`, and wait for it; None if none comes in time.

        An answer to an earlier asking, which comes late, is dropped: its ticket was taken again since.
        """
        self._turn += 1
        while not self._orders.empty():
            self._orders.get_nowait()
        self._send(msgspec.structs.replace(message, turn=self._turn))
        try:
            return await asyncio.wait_for(self._orders.get(), timeout=within_s)
        except TimeoutError:
            return None

    async def goodbye(self, cause: str) -> None:
        """Leave for good."""
        self._beating.cancel()
        self._hello()
        self._send(m.Goodbye(cause=cause[:200]))
        await self._dealer.close()

    def _hello(self) -> None:
        hello = m.Hello(
            versions=sorted(m.SUPPORTED_VERSIONS),
            nonce=self._nonce,
            state="pilot",
            left_s=self._job.left_s,
            job=self._job.id,
            restart=self._job.restarts,
        )
        self._send(hello)

    def _send(self, message: m.Message) -> None:
        self._dealer.send(codec.encode(message))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self._clock.monotonic() - self._heard_at > SILENCE_BEATS * HEARTBEAT_S:
                self._heard_at = self._clock.monotonic()
                self._dealer.reconnect()
                self._hello()
            else:
                self._send(m.Renew(left_s=self._job.left_s))

    def _received(self, frames: list[bytes]) -> None:
        self._heard_at = self._clock.monotonic()
        for frame in frames:
            message = codec.decode_from_relay(frame)
            if isinstance(message, m.Order):
                if message.turn == self._turn:
                    self._orders.put_nowait(message)
            elif isinstance(message, m.Refused):
                if message.code == UNKNOWN_SESSION:
                    self._hello()
                else:
                    _log.error(
                        "refused by the relay: %s",
                        message.detail,
                        extra={"event": "refused", "code": message.code},
                    )
                    self._refused.set()

    def _saw(self, event: LinkEvent, endpoint: str) -> None:
        if event is LinkEvent.DISCONNECTED:
            self._parted = True
        elif event is LinkEvent.CONNECTED and self._parted:
            self._parted = False
            self._hello()  # the relay does not know the new connection
        elif event is LinkEvent.REFUSED:
            _log.error(
                "the relay refuses this pilot's key",
                extra={"event": "refused", "endpoint": endpoint},
            )
            self._refused.set()
