"""What pilots say: they live, how much of their walltime is left, what became of their worker, and the ticket of a successor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.orders import Orders
from edif_hpc.wire import messages as m

_log = logging.getLogger(__name__)

_WORDS = 2000


@dataclass(kw_only=True)
class Pilots:
    """All pilots. `died` says that an allocation's worker is gone; `background` runs what nobody awaits."""

    fleet: Fleet
    orders: Orders
    died: Callable[[str, str, str], None]
    background: Callable[[Coroutine[Any, Any, None]], None]
    _last_words: dict[str, str] = field(default_factory=dict)

    def says(
        self,
        allocation: str,
        message: m.FromPeer,
        heard_at: float,
        answer: Callable[[m.FromRelay], object],
    ) -> None:
        """One message, but for the welcome, which is the gateway's."""
        left_s = message.left_s if isinstance(message, m.Hello | m.Renew) else None
        self.fleet.pilot_spoke(allocation, heard_at, left_s)
        match message:
            case m.Hello():
                self._greeted(allocation, message)
            case m.Renew():
                answer(m.Beat())
            case m.Report():
                self._reported(allocation, message)
            case m.Revive():
                self.background(self._revive(allocation, message, answer))
            case m.Ordered():
                self.background(self._ordered(allocation, message, answer))
            case m.Goodbye():
                self._left(allocation, message.cause)
            case _:
                return

    def _greeted(self, allocation: str, hello: m.Hello) -> None:
        row = self.fleet.allocation(allocation)
        self.fleet.jobs.of(allocation).restarts = hello.restart
        if row is not None and row.job_id is None and hello.job is not None:
            # It began before its submission was reported, or that report was lost.
            self.background(self.fleet.change(allocation, job_id=hello.job))

    def _reported(self, allocation: str, report: m.Report) -> None:
        _log.info(
            "pilot",
            extra={
                "event": "pilot_report",
                "allocation": allocation,
                "report": report.event,
                "detail": report.detail[-500:],
            },
        )
        if report.event == "worker_exited":
            self._last_words[allocation] = report.detail[-_WORDS:]
            self.died(allocation, report.detail[-200:], report.nonce)

    def _left(self, allocation: str, cause: str) -> None:
        self.died(allocation, cause, "")
        words = self._last_words.pop(allocation, "")
        self.background(self.fleet.end(allocation, cause=cause, detail=words))

    async def _revive(
        self, allocation: str, asked: m.Revive, answer: Callable[[m.FromRelay], object]
    ) -> None:
        found = await self.orders.revive(allocation, may_submit=asked.may_submit)
        if isinstance(found, str):
            answer(m.Order(reason=found, turn=asked.turn))
            return
        ticket = {key: value for key, value in found.items() if key != "kind"}
        answer(m.Order(**ticket, turn=asked.turn))

    async def _ordered(
        self, allocation: str, told: m.Ordered, answer: Callable[[m.FromRelay], object]
    ) -> None:
        if told.job_id is not None:
            await self.orders.submitted(told.allocation, allocation, told.job_id)
        else:
            kind = told.refusal or "retry"
            await self.orders.refused(told.allocation, allocation, kind, told.detail)
        answer(m.Order(reason=m.HEARD, turn=told.turn))
