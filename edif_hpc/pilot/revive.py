"""Reviving: the pilot submits the next generation of its slot, when the relay says that it is time.

The relay decides (`domain.succession`) and writes the order; whoever asks first holds it. A pilot asks for its own slot alone,
every `ASK_S`, sooner when its end has begun. So a service goes on without anything on a login node, where compute nodes may
submit; where they may not, the launcher does the same.

A submission whose outcome is not known is looked for by its name, in two listings that are apart, before the relay is told
that there is none.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from edif_hpc.errors import SlurmUnavailable, SubmitRefused, SubmitUnknown
from edif_hpc.pilot.ending import Ending
from edif_hpc.slurm.ordering import Ordering, Ticket
from edif_hpc.slurm.status import JobLine
from edif_hpc.wire import messages as m

_log = logging.getLogger(__name__)

ASK_S: Final = 15.0
HURRY_S: Final = 2.0
REPEAT_S: Final = 5.0
LAST_S: Final = 4.0
LISTINGS: Final = 2


class Relay(Protocol):
    """The relay as it is seen from here."""

    async def ask(self, message: m.Revive | m.Ordered, *, within_s: float) -> m.Order | None:
        """Send, and wait for the answer; None if none comes in time."""


class Scheduler(Protocol):
    """Finds a job."""

    def find(self, name: str) -> JobLine | None:
        """The job of that name; None if a full listing has none; `SlurmUnavailable` if there was no listing."""


@dataclass(kw_only=True)
class Reviving:
    """One pilot's care for its successor."""

    ordering: Ordering
    scheduler: Scheduler
    relay: Relay
    ending: Ending
    ask_s: float = ASK_S
    apart_s: float = ASK_S
    _submitted: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Ask, and submit, for as long as the pilot lives."""
        while True:
            order = await self.relay.ask(m.Revive(may_submit=True), within_s=REPEAT_S)
            if order is not None and order.allocation is not None:
                await self._carry_out(msgspec.convert(order, Ticket, from_attributes=True))
            if self.ending.begun:
                await asyncio.sleep(HURRY_S)
                continue
            waiting = asyncio.ensure_future(self.ending.until_begun())
            await asyncio.wait([waiting], timeout=self.ask_s)
            waiting.cancel()

    async def last_chance(self) -> None:
        """The worker has left, perhaps before its time: wait a moment for the ticket, unless it was ours already."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._submitted.wait(), timeout=LAST_S)

    async def _carry_out(self, ticket: Ticket) -> None:
        try:
            job_id: str | None = await asyncio.to_thread(self.ordering.submit, ticket)
        except SubmitRefused as error:
            await self._tell(ticket, kind=error.kind, detail=str(error))
            return
        except SubmitUnknown as error:
            _log.warning("%s", error, extra={"event": "submit_unknown", "job_name": ticket.name})
            job_id = await self._found(ticket.name)
            if job_id is None:
                await self._tell(ticket, kind="retry", detail=str(error))
                return
        extra = {"event": "revived", "job_name": ticket.name, "job": job_id}
        _log.info("submitted the successor", extra=extra)
        await self._tell(ticket, job_id=job_id)
        self._submitted.set()

    async def _found(self, name: str) -> str | None:
        missed = 0
        while missed < LISTINGS:
            await asyncio.sleep(self.apart_s)  # a listing may be older than the job
            try:
                line = await asyncio.to_thread(self.scheduler.find, name)
            except SlurmUnavailable:
                continue  # nothing is known
            if line is not None:
                return line.job_id
            missed += 1
        return None

    async def _tell(
        self, ticket: Ticket, *, job_id: str | None = None, kind: str = "", detail: str = ""
    ) -> None:
        told = m.Ordered(
            allocation=ticket.allocation,
            job_id=job_id,
            refusal=kind or None,
            detail=detail[-2000:],
        )
        while (
            True
        ):  # if the relay is away for good, the job's name tells the same to whoever lists
            answer = await self.relay.ask(told, within_s=REPEAT_S)
            if answer is not None and answer.reason == m.HEARD:
                return
