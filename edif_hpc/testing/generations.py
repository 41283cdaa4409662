"""The generations of slots as the relay's books tell them, and what their changes cost.

A slot is *empty* while no worker of it takes requests, and it *overlaps* while two of its allocations run. Both are read from the
events of the allocations, after the relay has stopped: from warm to the drain a generation serves, from its start to its
end it occupies its GPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from edif_hpc.domain.allocation import Allocation, AllocationState
from edif_hpc.domain.request import Request
from edif_hpc.store.base import Attempt
from edif_hpc.store.sqlite import SqliteStore

_A = AllocationState
_ALL = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One allocation and its moments, in wall seconds; None for what never happened."""

    allocation: str
    name: str
    slot: int
    number: int
    ordered: float
    submitted: float | None
    started: float | None
    warm: float | None
    drained: float | None
    ended: float | None
    cause: str

    @property
    def served_until(self) -> float | None:
        """When it stopped to take requests."""
        known = [each for each in (self.drained, self.ended) if each is not None]
        return min(known, default=None)

    def line(self, origin: float) -> str:
        """For people: seconds since `origin`."""
        moments = ("ordered", "submitted", "started", "warm", "drained", "ended")
        shown = (
            f"{name} {at - origin:6.1f}" if at is not None else f"{name}      -"
            for name in moments
            for at in [getattr(self, name)]
        )
        return f"{self.slot}/{self.number}: {'  '.join(shown)}  {self.cause}"


@dataclass(frozen=True, kw_only=True)
class HandOver:
    """A generation that drained because its successor was warm, and what was under way on it then."""

    old: Generation
    at: float
    running: int  #: requests
    uploads: int  #: of them, those whose large result was going up


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the changes of all slots cost, in seconds."""

    gaps: int  #: how often a slot was empty between two generations
    gap_s: float
    overlap_s: float  #: in which two allocations of a slot ran
    allocated_s: float  #: of all allocations

    @property
    def overlap_share(self) -> float:
        """Of all allocated time."""
        return self.overlap_s / self.allocated_s if self.allocated_s else 0.0


@dataclass(frozen=True, kw_only=True)
class Books:
    """What a stopped relay's books tell of generations and hand-overs."""

    generations: list[Generation]  #: by slot and number
    hand_overs: list[HandOver]


def read(data_dir: Path) -> Books:
    """Read a stopped relay's books."""
    store = SqliteStore(data_dir / "queue.sqlite")
    store.open()
    try:
        rows = store.allocations(live_only=False)
        made = sorted((_generation(store, row) for row in rows), key=lambda e: (e.slot, e.number))
        on = {peer.key: peer.allocation for peer in store.peers(revoked=True)}
        large = {each.id: _is_large(each) for each in store.requests(limit=_ALL)}
        attempts = [attempt for request in large for attempt in store.attempts(request)]
    finally:
        store.close()
    changes = [
        old for old, new in pairwise(made) if old.slot == new.slot and _handed_over(old, new)
    ]
    found = []
    for old in changes:
        at = old.served_until or 0.0
        under_way = [e for e in attempts if on.get(e.holder) == old.allocation and _spans(e, at)]
        uploads = sum(large[each.request_id] for each in under_way)
        found.append(HandOver(old=old, at=at, running=len(under_way), uploads=uploads))
    return Books(generations=made, hand_overs=found)


def _is_large(request: Request) -> bool:
    return request.result is not None and request.result.key is not None


def _spans(attempt: Attempt, at: float) -> bool:
    """Whether a request ran at that moment."""
    begun = attempt.started_at is not None and attempt.started_at < at
    return begun and (attempt.ended_at is None or attempt.ended_at > at)


def cost(generations: Iterable[Generation]) -> Cost:
    """Add up the changes of all slots, from each one's first warm worker on."""
    slots: dict[int, list[Generation]] = {}
    for each in generations:
        slots.setdefault(each.slot, []).append(each)
    found = [gap for mine in slots.values() for gap in _gaps(mine)]
    pairs = [pair for mine in slots.values() for pair in pairwise(mine)]
    return Cost(
        gaps=len(found),
        gap_s=sum(found),
        overlap_s=sum(_overlap(*pair) for pair in pairs),
        allocated_s=sum(_length(each) for mine in slots.values() for each in mine),
    )


def _generation(store: SqliteStore, row: Allocation) -> Generation:
    first: dict[str, float] = {}
    for event in store.allocation_events(row.id):
        first.setdefault(event.event, event.at)
    return Generation(
        allocation=row.id,
        name=row.name,
        slot=row.slot,
        number=row.generation,
        ordered=row.submitted_at,
        submitted=first.get(_A.SUBMITTED),
        started=row.started_at,
        warm=row.warm_at,
        drained=first.get(_A.DRAINING),
        ended=row.ended_at,
        cause=row.cause or "",
    )


def _gaps(slot: Sequence[Generation]) -> list[float]:
    """How long nobody served, each time between two that did."""
    served = sorted(
        (each.warm, each.served_until)
        for each in slot
        if each.warm is not None and each.served_until is not None
    )
    gaps, until = [], None
    for warm, end in served:
        if until is not None and warm > until:
            gaps.append(warm - until)
        until = end if until is None else max(until, end)
    return gaps


def _handed_over(old: Generation, new: Generation) -> bool:
    until = old.served_until
    return old.warm is not None and new.warm is not None and until is not None and new.warm < until


def _overlap(old: Generation, new: Generation) -> float:
    if new.started is None or old.ended is None:
        return 0.0
    ends = old.ended if new.ended is None else min(old.ended, new.ended)
    return max(0.0, ends - new.started)


def _length(each: Generation) -> float:
    return 0.0 if each.started is None or each.ended is None else each.ended - each.started
