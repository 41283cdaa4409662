"""The slots: every few seconds, what `domain.succession` decides for each is carried out.

Here facts are gathered and actions done; every rule is in the domain. A decision needs no memory: it is made anew from the rows
and from what pilots and launchers said, so a relay that was started anew goes on where it was. Only allocations that have a
walltime are looked at; one without an end is an operator's own affair.

    ORDER    a row for the next generation; a launcher, or the pilot before it, fetches and submits it (`relay.orders`)
    DRAIN    the worker is told to finish and leave
    CANCEL   what nobody has taken yet is ended; what may be in a scheduler's queue is cancelled by a launcher
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain import governor, learning, succession
from edif_hpc.domain.allocation import PENDING, Allocation, AllocationState
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.learning import Priors, Times
from edif_hpc.domain.pending import understand
from edif_hpc.domain.succession import Cancel, Decision, Drain, Member, Order, Slot, Wanted
from edif_hpc.errors import EdifError, NotFound
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.governing import Governing
from edif_hpc.relay.orders import Orders

_log = logging.getLogger(__name__)

PERIOD_S = 2.0
_NOTED_EVENTS = 20


@dataclass(kw_only=True)
class Slots:
    """All slots of all deployments."""

    fleet: Fleet
    orders: Orders
    governing: Governing
    clock: Clock
    priors: Priors = field(default_factory=Priors)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            try:
                await self.reconcile()
            except EdifError as error:  # the store is away: the next round tries again
                _log.error(
                    "slots were not reconciled",
                    extra={"event": "reconcile_failed", "reason": str(error)},
                )
            await asyncio.sleep(PERIOD_S)

    async def reconcile(self) -> None:
        """One round over all deployments."""
        decisions = self._decisions()
        cancels = {
            row.id: "an operator drained it"
            for row in self.fleet.live()
            if row.id in self.fleet.unwanted and row.state in PENDING
        }
        for (name, _), decision in decisions.items():
            for action in decision.actions:
                await self._carry_out(name, action, cancels)
        self.fleet.decisions, self.orders.cancels = decisions, cancels

    def explain(self, deployment: str, index: int) -> dict[str, Any]:
        """Everything that is known of one slot, for people."""
        known = self.fleet.deployment(deployment)
        decision = self.fleet.decisions.get((deployment, index))
        rows = [each for each in self.fleet.history() if each.place == (deployment, index)]
        if decision is None and not rows and index >= known.replicas:
            raise NotFound(f"{deployment} has no slot {index}; it wants {known.replicas} replicas")
        times = self.fleet.expected.get(deployment, Times())
        return {
            "deployment": deployment,
            "slot": index,
            "site": known.site,
            "up": known.up_at is not None,
            "paused": known.up_at is not None and self.governing.permit(known).paused,
            "why": "" if decision is None else decision.why,
            "advice": "" if decision is None else decision.advice,
            "gap_s": 0.0 if decision is None else decision.gap_s,
            "expected": {
                "wait_s": times.wait_s,
                "warmup_s": times.warmup_s,
                "request_s": times.request_s,
                "lead_s": times.lead_s,
            },
            "launcher": self.orders.heard().get(known.site or ""),
            "excluded_nodes": self.governing.bad_nodes(known.site) if known.site else (),
            "generations": [self._generation(each) for each in rows[-_NOTED_EVENTS:]],
        }

    # -- facts ---------------------------------------------------------------------------------------------------------

    def _decisions(self) -> dict[tuple[str, int], Decision]:
        ending: dict[str, dict[int, list[Allocation]]] = {
            each.name: {} for each in self.fleet.deployments()
        }
        for row in self.fleet.live():
            if row.walltime_min is not None:
                slots = ending.setdefault(row.deployment, {})
                slots.setdefault(row.slot, []).append(row)
        return {
            (name, decision.slot): decision
            for name, slots in sorted(ending.items())
            for decision in self._decide(name, slots)
        }

    def _decide(self, name: str, rows: dict[int, list[Allocation]]) -> list[Decision]:
        try:
            deployment = self.fleet.deployment(name)
        except NotFound:  # it was removed
            deployment = None
        wanted = self._wanted(deployment)
        site = deployment.site if deployment is not None else None
        times = self._times(name, site)
        self.fleet.expected = {**self.fleet.expected, name: times}
        indexes = set(rows) | set(range(wanted.replicas))
        slots = [
            Slot(index=index, members=tuple(self._member(each) for each in rows.get(index, ())))
            for index in sorted(indexes)
        ]
        return succession.plan(slots, wanted, times)

    def _wanted(self, deployment: Deployment | None) -> Wanted:
        if deployment is None or deployment.up_at is None or deployment.walltime_min is None:
            return Wanted(replicas=0, walltime_s=None, margin_s=self.fleet.margin_s)
        return Wanted(
            replicas=deployment.replicas,
            walltime_s=60.0 * deployment.walltime_min,
            permit=self.governing.permit(deployment),
            margin_s=self.fleet.margin_s,
            up_s=self.clock.wall() - deployment.up_at,
        )

    def _times(self, name: str, site: str | None) -> Times:
        wall = self.clock.wall()
        waiting = [
            wall - each.submitted_at - each.begin_after_s
            for each in self.fleet.live()
            if each.site == site and each.state is AllocationState.SUBMITTED
        ]
        return learning.learn(
            list(self.fleet.history()),
            deployment=name,
            site=site or "",
            request_s=self.fleet.times(name).p90_s,
            waiting_s=waiting,
            priors=self.priors,
        )

    def _member(self, row: Allocation) -> Member:
        now = self.clock.monotonic()
        return Member(
            allocation=row.id,
            generation=row.generation,
            state=row.state,
            walltime_s=None if row.walltime_min is None else 60.0 * row.walltime_min,
            left_s=None if row.state in PENDING else self.fleet.left_s(row.id),
            age_s=max(0.0, self.clock.wall() - row.submitted_at),
            held=row.order_holder is not None,
            reason=self.fleet.jobs.of(row.id).reason,
            start_in_s=self.fleet.jobs.start_in_s(row.id, now),
        )

    # -- actions -------------------------------------------------------------------------------------------------------

    async def _carry_out(
        self, deployment: str, action: succession.Action, cancels: dict[str, str]
    ) -> None:
        match action:
            case Order():
                await self._order(self.fleet.deployment(deployment), action)
            case Drain():
                await self.fleet.drain(None, action.allocation, why=action.why)
                _note("drains", action.allocation, action.why)
            case Cancel():
                row = self.fleet.allocation(action.allocation)
                if row is not None and row.order_holder is None:
                    await self.fleet.end(row.id, cause=governor.CANCELLED, detail=action.why)
                else:
                    cancels[action.allocation] = action.why

    async def _order(self, deployment: Deployment, order: Order) -> None:
        if deployment.site is None:
            return
        row = await self.fleet.add(
            deployment.name,
            order.slot,
            site=deployment.site,
            walltime_min=max(1, math.floor(order.walltime_s / 60.0)),
            begin_after_s=order.begin_after_s,
        )
        if row is not None:
            _note("ordered", row.id, f"{row.name}, {row.walltime_min} min")

    # -- words ---------------------------------------------------------------------------------------------------------

    def _generation(self, row: Allocation) -> dict[str, Any]:
        job = self.fleet.jobs.of(row.id) if row.ended_at is None else None
        reason = job.reason if job is not None else ""
        return {
            "name": row.name,
            "generation": row.generation,
            "state": str(row.state),
            "job_id": row.job_id,
            "node": row.node,
            "walltime_min": row.walltime_min,
            "left_s": None if row.ended_at is not None else self.fleet.left_s(row.id),
            "submitted_at": row.submitted_at,
            "started_at": row.started_at,
            "warm_at": row.warm_at,
            "ended_at": row.ended_at,
            "cause": row.cause,
            "detail": row.detail,
            "reason": reason,
            "advice": understand(reason).advice,
        }


def _note(event: str, allocation: str, why: str) -> None:
    _log.info(
        "allocation %s: %s",
        event,
        why,
        extra={"event": f"allocation_{event}", "allocation": allocation},
    )
