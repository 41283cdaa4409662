"""Which request may a worker take next.

Pure: queue and workers in, a decision out. The order inside a deployment is round-robin over owners, and inside an
owner by acceptance; a request that was put back keeps its place, so it is at the head of its owner's line. Rotation
goes by who was served least recently, which keeps one owner's thousand requests from starving another's one.

A worker holds at most `window` leases. Those beyond its `executors` are prefetched: taken ahead so that an executor
never idles for a round trip. Prefetch only happens behind work that is expected to end soon, and a prefetched lease
is stealable until it starts, so no request waits behind an hour's run while another worker idles.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable
from dataclasses import dataclass

PREFETCH_WITHIN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A queued request as the decision sees it."""

    id: str
    seq: int
    owner: str


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A worker as the decision sees it. Seconds are estimates of when its present work ends."""

    peer: str
    executors: int
    held: int  #: leases it holds
    window: int  #: leases that it is willing to hold
    busy_for_s: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether it could start a request now."""
        return self.held < min(self.executors, self.window)

    @property
    def may_prefetch(self) -> bool:
        """Whether it may take one ahead."""
        return self.executors <= self.held < self.window and self.busy_for_s <= PREFETCH_WITHIN_S


def choose_seat(seats: Iterable[Seat]) -> Seat | None:
    """The worker for the next request: an idle one with the fewest leases, else one that may prefetch."""
    idle, ahead = [], []
    for seat in seats:
        if seat.idle:
            idle.append(seat)
        elif seat.may_prefetch:
            ahead.append(seat)
    pool = idle or ahead
    return min(pool, key=lambda seat: (seat.held, seat.busy_for_s, seat.peer)) if pool else None


@dataclass(frozen=True, kw_only=True)
class Prefetched:
    """A lease that was taken ahead and has not started."""

    request: str
    holder: str
    holder_busy_for_s: float


def choose_steal(seats: Iterable[Seat], prefetched: Iterable[Prefetched]) -> Prefetched | None:
    """A lease to take back when a worker idles and nothing is queued: the one that would wait longest."""
    idle = {seat.peer for seat in seats if seat.idle}
    if not idle:
        return None
    candidates = [
        each for each in prefetched if each.holder not in idle and each.holder_busy_for_s > 0
    ]
    return max(candidates, key=lambda each: each.holder_busy_for_s, default=None)


class FairQueue:
    """The queued requests of one deployment, in round-robin order over owners.

    Pure; no operation scans the queue but `order`.
    """

    def __init__(self) -> None:
        self._lines: dict[
            str, list[tuple[int, str]]
        ] = {}  # owner -> heap of (seq, id), with stale entries
        self._waiting: dict[str, Waiting] = {}
        self._turns: dict[str, int] = {}  # owner -> turn in which they were served last
        self._turn = 0

    def push(self, waiting: Waiting) -> None:
        """Add a request; one that was taken before returns to the head of its owner's line by its `seq`."""
        if waiting.id not in self._waiting:
            self._waiting[waiting.id] = waiting
            heapq.heappush(self._lines.setdefault(waiting.owner, []), (waiting.seq, waiting.id))

    def remove(self, request_id: str) -> None:
        """Take a request out, wherever it stands; unknown ids are ignored."""
        self._waiting.pop(request_id, None)

    def pop(self) -> Waiting | None:
        """Take the next request out, and count the turn of its owner."""
        heads = [
            (self._turns.get(owner, 0), *head, owner)
            for owner in list(self._lines)
            if (head := self._head(owner))
        ]
        if not heads:
            return None
        _, _, request_id, owner = min(heads)
        heapq.heappop(self._lines[owner])
        self._turn += 1
        self._turns[owner] = self._turn
        return self._waiting.pop(request_id)

    def order(self) -> list[Waiting]:
        """All queued requests in the order in which they would be taken, in O(n log n)."""
        lines: dict[str, list[Waiting]] = {}
        for each in sorted(self._waiting.values(), key=lambda waiting: waiting.seq):
            lines.setdefault(each.owner, []).append(each)
        first = sorted(lines, key=lambda owner: (self._turns.get(owner, 0), lines[owner][0].seq))
        rounds = itertools.zip_longest(*(lines[owner] for owner in first))
        return [each for one_round in rounds for each in one_round if each is not None]

    def _head(self, owner: str) -> tuple[int, str] | None:
        line = self._lines[owner]
        while line and line[0][1] not in self._waiting:
            heapq.heappop(line)
        if not line:
            del self._lines[owner]
            return None
        return line[0]

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting
