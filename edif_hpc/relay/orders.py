"""Orders: what launchers and pilots are to submit and to cancel, and what they say became of it.

An order is an allocation's row before anybody has submitted it (`domain.order`). It is given to one holder at a time. When a
holder falls silent its job may exist, or not: the order is given out again only when it is proven that the scheduler has no
such job (`relay.jobs`), and then with a new join token, so that a job that turns up after all cannot join. Such a job is a
*stray*, and so is one that outlives its allocation: the launcher is told to cancel it.

A pilot that may submit takes the ticket of its successor in the same way, as a holder among others; it alone may take its own
order again without proof, because it is one process and knows what it did.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass, field, replace
from typing import Any, Final

from edif_hpc.clock import Clock
from edif_hpc.domain import governor
from edif_hpc.domain.allocation import PENDING, Allocation, AllocationState
from edif_hpc.domain.order import ORDER_LEASE_S
from edif_hpc.domain.people import secret_hash
from edif_hpc.errors import NotFound, TransitionRefused
from edif_hpc.relay.governing import Governing
from edif_hpc.relay.jobs import JobLine, Jobs
from edif_hpc.relay.roll import Roll
from edif_hpc.store.writer import Writer

_log = logging.getLogger(__name__)

GONE: Final = "gone"
NEVER_JOINED: Final = "its pilot could not join"
#: Pilots that found no relay in time have told it by a launcher so long after it is back.
_BACK_S: Final = 300.0
#: An allocation that has ended leaves its job so much time to end by itself.
_LEAVING_S: Final = 180.0


@dataclass(kw_only=True)
class _Refusals:
    count: int = 0
    until: float = 0.0  # monotonic


@dataclass(kw_only=True)
class Orders:
    """All orders, and what launchers have said."""

    writer: Writer
    roll: Roll
    jobs: Jobs
    governing: Governing
    clock: Clock
    silent_s: float  #: a pilot that says nothing for so long is silent
    cancels: dict[str, str] = field(default_factory=dict)  #: allocation -> why; set by `Slots`
    #: site -> launcher that asked last, and when (monotonic)
    launchers: dict[str, tuple[str, float]] = field(default_factory=dict)
    _strays: dict[tuple[str, str], tuple[Allocation, str]] = field(default_factory=dict)
    _refused: dict[str, _Refusals] = field(default_factory=dict)
    #: How the log ends of one whose job was missed in a listing.
    _words: dict[str, str] = field(default_factory=dict)
    _began: float = field(init=False)  # wall

    def __post_init__(self) -> None:
        self._began = self.clock.wall()

    # -- launchers -----------------------------------------------------------------------------------------------------

    async def fetch(self, site: str, launcher: str, limit: int) -> list[dict[str, Any]]:
        """What a launcher is to cancel and to submit now; it holds the orders of the latter."""
        self.launchers[site] = (launcher, self.clock.monotonic())
        self._refused = {k: e for k, e in self._refused.items() if self.roll.allocation(k)}
        self._words = {k: e for k, e in self._words.items() if self.roll.allocation(k)}
        out = self._cancel_orders(site) + self._word_orders(site)
        orders = [each for each in self._orders_of(site) if self._available(each, launcher)]
        for order in orders[:limit]:
            taken = await self._take(order, launcher)
            if taken is None:
                break
            out += taken
        return out

    async def report(
        self,
        site: str,
        launcher: str,
        *,
        submitted: list[tuple[str, str]],
        refused: list[tuple[str, str, str]],
        cancelled: list[str],
        jobs: list[JobLine] | None,
        unheard: list[tuple[str, str, str]] | None = None,
        words: list[tuple[str, str]] | None = None,
        detail: str = "",
    ) -> None:
        """What a launcher did and saw. `jobs` None: the scheduler could not be asked, so nothing is known."""
        self.launchers[site] = (launcher, self.clock.monotonic())
        for name, node, said in unheard or []:  # before their jobs are only found to be over
            await self._never_joined(site, name, node, said)
        self._words |= {key: said for key, said in words or [] if self.roll.allocation(key)}
        if jobs is not None:  # before what follows: it was taken before that
            await self._listed(site, launcher, jobs)
        if detail:
            extra = {"event": "launcher_says", "site": site, "launcher": launcher}
            _log.warning("launcher %s: %s", launcher, detail[-500:], extra=extra)
        for allocation_id in cancelled:
            await self._cancelled(allocation_id)
        for allocation_id, kind, detail in refused:
            await self.refused(allocation_id, launcher, kind, detail)
        for allocation_id, job_id in submitted:
            await self.submitted(allocation_id, launcher, job_id)

    def heard(self) -> dict[str, dict[str, Any]]:
        """The launcher last heard of, for each site."""
        now = self.clock.monotonic()
        return {
            site: {"name": name, "silent_s": round(now - at, 1)}
            for site, (name, at) in self.launchers.items()
        }

    # -- pilots --------------------------------------------------------------------------------------------------------

    async def revive(self, allocation_id: str, *, may_submit: bool) -> dict[str, Any] | str:
        """The ticket of a pilot's successor, or why there is none for it."""
        mine = self.roll.allocation(allocation_id)
        if mine is None:
            return "this allocation has ended"
        order = max(
            (
                e
                for e in self.roll.live()
                if e.place == mine.place and e.generation > mine.generation
            ),
            key=lambda each: each.generation,
            default=None,
        )
        if order is None:
            return "no successor is ordered yet"
        if order.state is not AllocationState.ORDERED:
            return f"{order.name} is {order.state} (job {order.job_id})"
        if not may_submit:
            return f"{order.name} waits for a launcher"
        own = order.order_holder == allocation_id
        if not self._open(order) or not (own or self._available(order, allocation_id)):
            return f"{order.name} is being submitted by {order.order_holder or 'nobody yet'}"
        taken = await self._take(order, allocation_id)
        return taken[0] if taken else f"{order.name}: too many submissions, or somebody was faster"

    # -- what became of an order ---------------------------------------------------------------------------------------

    async def submitted(self, allocation_id: str, holder: str, job_id: str) -> None:
        """A holder submitted it. If it is not that one's any more, the job is a stray."""
        now = self.clock.wall()
        try:
            row = await self.writer.submit(
                lambda store: store.submit_order(allocation_id, holder, job_id, now)
            )
        except (TransitionRefused, NotFound) as error:
            known = self._known(allocation_id)
            _log.warning(
                "a job is one too many: %s",
                error,
                extra={"event": "stray_job", "allocation": allocation_id, "job": job_id},
            )
            if known is not None and known.job_id != job_id:
                self._stray(known, job_id, "another job was submitted for this allocation")
            return
        self._refused.pop(allocation_id, None)
        self.jobs.doubt(allocation_id)
        self.roll.adopt(replace(row, detail=""))

    async def refused(self, allocation_id: str, holder: str, kind: str, detail: str) -> None:
        """The scheduler did not take it: later again, or never as it is (`config`)."""
        order = self.roll.allocation(allocation_id)
        if order is None or order.order_holder != holder:
            return
        if kind == "config":
            await self.roll.end(allocation_id, cause=governor.REFUSED, detail=detail)
            return
        try:
            row = await self.writer.submit(lambda store: store.free_order(allocation_id, holder))
        except TransitionRefused:
            return  # it was submitted after all
        refusals = self._refused.setdefault(allocation_id, _Refusals())
        refusals.count += 1
        # A death may be chance, so the first pause after one is none; a refusal says to wait.
        pause_s = governor.back_off_s(refusals.count + 1)
        refusals.until = self.clock.monotonic() + pause_s
        words = f"refused by the scheduler ({kind}), again in {pause_s / 60:.0f} min: {detail}"
        self.roll.adopt(replace(row, detail=words[:2000]))

    async def _never_joined(self, site: str, name: str, node: str, words: str) -> None:
        """Its pilot could not speak to us, and said why to the launcher.

        Another job of that name may have joined since, and serves: such words say nothing of it.
        """
        now = self.clock.monotonic()
        for row in self.roll.live():
            silent = self.roll.silence_s(row.id, now) >= self.silent_s
            if (row.site, row.name) == (site, name) and silent:
                cause = governor.AWAY if self._was_away(row) else NEVER_JOINED
                await self.roll.end(row.id, cause=cause, detail=words, node=node)

    def _was_away(self, row: Allocation) -> bool:
        """Whether we were started while it waited, and only just: then it found nobody, and that is no fault of its own."""
        return row.submitted_at < self._began and self.clock.wall() - self._began < _BACK_S

    async def _cancelled(self, allocation_id: str) -> None:
        strays = [key for key in self._strays if key[0] == allocation_id]
        for key in strays:
            del self._strays[key]
        why, row = self.cancels.get(allocation_id), self.roll.allocation(allocation_id)
        if not strays and why is not None and row is not None and row.state in PENDING:
            await self.roll.end(allocation_id, cause=governor.CANCELLED, detail=why)

    async def _listed(self, site: str, launcher: str, lines: list[JobLine]) -> None:
        now = self.clock.monotonic()
        live = [e for e in self.roll.live() if e.site == site and e.order_holder is not None]
        listing = self.jobs.listed(live, launcher, lines, now)
        for row, line in listing.found:
            if row.job_id is None and row.order_holder is not None:
                await self.submitted(row.id, row.order_holder, line.job_id)
            self._waits(row.id, line)
        for row, line in listing.strays:
            self._stray(row, line.job_id, "another job was submitted for this allocation")
        for row, state in listing.over:
            await self._gone(row, now, f"its job is {state.lower()}")
        for row in (each for each in live if self.jobs.absent(each.id)):
            await self._absent(row, now)
        self._outlived(site, lines)

    async def _absent(self, row: Allocation, now: float) -> None:
        if row.state is not AllocationState.ORDERED:
            await self._gone(row, now, "its job is in no listing any more")
        elif row.id in self.cancels and _expired(row, self.clock.wall()):
            why = self.cancels[row.id]
            await self.roll.end(row.id, cause=governor.CANCELLED, detail=why)

    def _waits(self, allocation_id: str, line: JobLine) -> None:
        """What those who wait for it are told."""
        row = self.roll.allocation(allocation_id)
        if row is not None and row.state in PENDING:
            self.roll.adopt(replace(row, detail=line.reason))

    async def _gone(self, row: Allocation, now: float, detail: str) -> None:
        """Its job is over, by proof; a pilot that speaks says how it ends."""
        if self.roll.silence_s(row.id, now) < self.silent_s:
            return
        said = self._words.get(row.id, "")
        words = f"{detail} (job {row.job_id})" + (f"; its log ends:\n{said}" if said else "")
        node = self.jobs.of(row.id).node if row.node is None else None
        await self.roll.end(row.id, cause=GONE, detail=words, node=node)

    def _outlived(self, site: str, lines: list[JobLine]) -> None:
        """Jobs of allocations that have ended are strays; those that are no more need no cancelling."""
        listed = {each.job_id for each in lines if each.alive}
        here = {key: stray for key, stray in self._strays.items() if stray[0].site == site}
        for key in here:
            if key[1] not in listed:
                del self._strays[key]
        ended = {each.name: each for each in self.roll.past if each.site == site}
        long_ago = self.clock.wall() - _LEAVING_S
        for line in lines:
            row = ended.get(line.name)
            if line.alive and row is not None and (row.ended_at or 0.0) < long_ago:
                self._stray(row, line.job_id, f"its allocation has ended ({row.cause})")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _orders_of(self, site: str) -> list[Allocation]:
        found = [each for each in self.roll.live() if each.site == site and self._open(each)]
        return sorted(found, key=lambda each: (each.submitted_at, each.id))

    def _open(self, row: Allocation) -> bool:
        """Whether it is an order that should be submitted now."""
        if row.state is not AllocationState.ORDERED or row.id in self.cancels:
            return False
        refusals = self._refused.get(row.id)
        if refusals is not None and refusals.until > self.clock.monotonic():
            return False
        try:
            deployment = self.roll.deployment(row.deployment)
        except NotFound:
            return False
        return self.governing.permit(deployment).granted

    def _available(self, order: Allocation, holder: str) -> bool:
        """Whether this holder may have it: nobody had it before, or it is proven that nothing was submitted."""
        if order.order_holder is None:
            return True
        mine = order.order_holder == holder
        return self.jobs.absent(order.id) and (mine or _expired(order, self.clock.wall()))

    async def _take(self, order: Allocation, holder: str) -> list[dict[str, Any]] | None:
        """Give out one order: none if somebody was faster, None if the site has had enough for now."""
        if not self.governing.take(order.site):
            return None
        token, now = secrets.token_urlsafe(32), self.clock.wall()
        self.jobs.doubt(order.id)
        try:
            row = await self.writer.submit(
                lambda store: store.take_order(
                    order.id, holder, now, lease_s=ORDER_LEASE_S, join_sha256=secret_hash(token)
                )
            )
        except TransitionRefused:
            return []
        self.roll.adopt(row)
        return [self._submit_order(row, token, now)]

    def _submit_order(self, row: Allocation, token: str, now: float) -> dict[str, Any]:
        deployment = self.roll.deployment(row.deployment)
        return {
            "kind": "submit",
            "allocation": row.id,
            "name": row.name,
            "join_token": token,
            "deployment": row.deployment,
            "slot": row.slot,
            "generation": row.generation,
            "gpu": deployment.gpu,
            "gpus": deployment.gpus,
            "walltime_min": row.walltime_min or 0,
            "exclude": list(self.governing.bad_nodes(row.site)),
            "begin_after_s": max(0.0, row.submitted_at + row.begin_after_s - now),
        }

    def _cancel_orders(self, site: str) -> list[dict[str, Any]]:
        """Only jobs that are known: an order whose job may or may not exist is settled by listings."""
        wanted = [
            (row, row.job_id, why)
            for allocation_id, why in self.cancels.items()
            if (row := self.roll.allocation(allocation_id)) is not None and row.state in PENDING
        ]
        strays = [(row, job_id, why) for (_, job_id), (row, why) in self._strays.items()]
        return [
            {
                "kind": "cancel",
                "allocation": row.id,
                "name": row.name,
                "job_id": job_id,
                "reason": why,
            }
            for row, job_id, why in [*wanted, *strays]
            if row.site == site and job_id is not None
        ]

    def _word_orders(self, site: str) -> list[dict[str, Any]]:
        """Logs to be read, before allocations are found to be gone whose pilots never said why."""
        now = self.clock.monotonic()
        return [
            {"kind": "words", "allocation": row.id, "name": row.name, "job_id": row.job_id}
            for row in self.roll.live()
            if row.site == site
            and row.job_id is not None
            and row.id not in self._words
            and self.jobs.of(row.id).missed
            and self.roll.silence_s(row.id, now) >= self.silent_s
        ]

    def _stray(self, row: Allocation, job_id: str, why: str) -> None:
        self._strays[row.id, job_id] = (row, why)

    def _known(self, allocation_id: str) -> Allocation | None:
        live = self.roll.allocation(allocation_id)
        return live or next((each for each in self.roll.past if each.id == allocation_id), None)


def _expired(order: Allocation, wall: float) -> bool:
    return order.order_until is None or order.order_until <= wall
