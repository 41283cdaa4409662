"""What is known of the scheduler's jobs behind the allocations. Memory only: it is told anew within seconds.

Two sources. A pilot measures on its node how much of its walltime is left; a launcher lists the jobs of its site. Both tell
*seconds from now*, never a time of their own clocks, and here they become deadlines in the relay's monotonic time. The pilot's
word on its end counts for more than the listing's.

A listing is proof of what it shows. What it does *not* show is proof of nothing by itself: it may have been taken before the
job was submitted, by a scheduler that had just been started. So a job counts as absent only when one launcher has
missed it in two successful listings, the second `LISTINGS_APART_S` or more after the first, and none has shown it since. A
failed listing is never sent, so it says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated

from msgspec import Meta, Struct

from edif_hpc.domain.allocation import Allocation, AllocationState

LISTINGS_APART_S = 15.0

Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Text = Annotated[str, Meta(max_length=400)]

#: States in which a job is over. Any other, also one that is not known here, means that it lives.
_OVER = frozenset(
    {
        "boot_fail",
        "cancelled",
        "completed",
        "deadline",
        "failed",
        "node_fail",
        "out_of_memory",
        "preempted",
        "timeout",
    }
)
_ALMOST_OVER = "completing"


class JobLine(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One job in a listing."""

    name: Text
    job_id: Text
    state: Text
    reason: Text = ""
    node: Text | None = None
    start_in_s: Seconds | None = None
    left_s: Seconds | None = None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._word in _OVER

    @property
    def alive(self) -> bool:
        """Whether cancelling it makes sense."""
        return self._word not in _OVER and self._word != _ALMOST_OVER

    @property
    def _word(self) -> str:
        return self.state.strip().partition(" ")[0].lower()


@dataclass(kw_only=True)
class Job:
    """What is known of one allocation's job; times are monotonic seconds of the relay."""

    state: str = ""
    reason: str = ""
    node: str | None = None
    start_at: float | None = None
    listed_end: float | None = None
    pilot_end: float | None = None
    restarts: int = 0
    missed: dict[str, float] = field(default_factory=dict)  #: launcher -> when it first missed it
    absent: bool = False


@dataclass(kw_only=True)
class Listing:
    """What follows from one listing."""

    found: list[tuple[Allocation, JobLine]] = field(default_factory=list)
    over: list[tuple[Allocation, str]] = field(default_factory=list)  #: and in what state
    strays: list[tuple[Allocation, JobLine]] = field(default_factory=list)  #: one too many


class Jobs:
    """The jobs of all live allocations."""

    def __init__(self) -> None:
        self._known: dict[str, Job] = {}

    def of(self, allocation_id: str) -> Job:
        """What is known of one."""
        return self._known.setdefault(allocation_id, Job())

    def forget(self, allocation_id: str) -> None:
        """Its allocation has ended."""
        self._known.pop(allocation_id, None)

    def pilot_told(self, allocation_id: str, left_s: float | None, now: float) -> None:
        """A pilot said how much of its walltime is left."""
        if left_s is not None:
            self.of(allocation_id).pilot_end = now + left_s

    def left_s(self, allocation_id: str, now: float) -> float | None:
        """How much is left of its walltime; None if nobody has said."""
        job = self._known.get(allocation_id)
        if job is None:
            return None
        end = job.pilot_end if job.pilot_end is not None else job.listed_end
        return None if end is None else max(0.0, end - now)

    def start_in_s(self, allocation_id: str, now: float) -> float | None:
        """When the scheduler means to start it."""
        job = self._known.get(allocation_id)
        return None if job is None or job.start_at is None else max(0.0, job.start_at - now)

    def absent(self, allocation_id: str) -> bool:
        """Whether it is proven that the scheduler has no such job."""
        job = self._known.get(allocation_id)
        return job is not None and job.absent

    def doubt(self, allocation_id: str) -> None:
        """It is being submitted at this moment: what was missed until now proves nothing."""
        job = self.of(allocation_id)
        job.missed, job.absent = {}, False

    def listed(
        self,
        allocations: Iterable[Allocation],
        launcher: str,
        lines: Iterable[JobLine],
        now: float,
    ) -> Listing:
        """Take in one full, successful listing of a site whose live, ordered allocations are given."""
        by_name: dict[str, list[JobLine]] = {}
        for line in lines:
            by_name.setdefault(line.name, []).append(line)
        listing = Listing()
        for allocation in allocations:
            named = by_name.get(allocation.name, [])
            mine = _own(allocation, named)
            listing.strays += [(allocation, e) for e in named if e is not mine and e.alive]
            if mine is None:
                self._missed(allocation, launcher, now)
            else:
                self._saw(allocation, mine, now)
                listing.found.append((allocation, mine))
                if mine.over:
                    listing.over.append((allocation, mine.state))
        return listing

    def _saw(self, allocation: Allocation, line: JobLine, now: float) -> None:
        self.doubt(allocation.id)
        job = self.of(allocation.id)
        job.state, job.reason, job.node = line.state, line.reason, line.node or job.node
        job.start_at = None if line.start_in_s is None else now + line.start_in_s
        job.listed_end = None if line.left_s is None else now + line.left_s

    def _missed(self, allocation: Allocation, launcher: str, now: float) -> None:
        job = self.of(allocation.id)
        first = job.missed.setdefault(launcher, now)
        job.absent = job.absent or now - first >= LISTINGS_APART_S


def _own(allocation: Allocation, named: list[JobLine]) -> JobLine | None:
    """The job of an allocation among those of its name: the one that was reported, else the newest submitted."""
    if allocation.job_id is not None:
        return next((each for each in named if each.job_id == allocation.job_id), None)
    if allocation.state is AllocationState.ORDERED and allocation.order_holder is None:
        return None  # nobody has its token: whatever carries the name cannot join
    return max(named, key=lambda each: (len(each.job_id), each.job_id), default=None)
