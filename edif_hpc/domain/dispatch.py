"""Which request may a worker take next.

Pure: queue and workers in, a decision out. The order inside a deployment is round-robin over owners, and inside an
owner by acceptance; a request that was put back keeps its place, so it is at the head of its owner's line. Rotation
goes by who was served least recently, which keeps one owner's thousand requests from starving another's one.

A worker holds at most `window` leases. Those beyond its `executors` are prefetched: taken ahead so that an executor
never idles for a round trip. Prefetch only happens behind work that is expected to end soon, and a prefetched lease
is stealable until it starts, so no request waits behind an hour's run while another worker idles.

A worker lives for one walltime. A request is given to it only if what the request probably needs, and a margin, fits into what
is left (`Seat.fits`); the next one in the line that fits goes first. What it needs is what nine of ten requests of its
deployment need, never more than its own time-out; one that was cut off before has to find twice what it had run.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edif_hpc.domain.lease import HEARTBEAT_S

PREFETCH_WITHIN_S = 2.0
#: What has to be left of a walltime when a request has ended: to send its result, and to be heard.
END_MARGIN_S = 90.0 + HEARTBEAT_S


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A queued request as the decision sees it."""

    id: str
    seq: int
    owner: str
    wall_s: float = math.inf  #: its own time-out
    cut_s: float = 0.0  #: how long it had run when a worker was lost under it

    def need_s(self, usual_s: float, longest_s: float = math.inf) -> float:
        """How long it will probably run.

        Args:
            usual_s: nine of ten requests of its deployment are shorter.
            longest_s: the longest that any worker of its deployment can give.
        """
        return min(max(usual_s, 2 * self.cut_s), self.wall_s, longest_s)


@dataclass(frozen=True, kw_only=True)
class Seat:
    """A worker as the decision sees it. Seconds are estimates of when its present work ends."""

    peer: str
    executors: int
    held: int  #: leases it holds
    window: int  #: leases that it is willing to hold
    busy_for_s: float = 0.0
    left_s: float | None = None  #: of its walltime; None has no end
    margin_s: float = END_MARGIN_S

    def fits(self, need_s: float) -> bool:
        """Whether a request that needs so long would end in time."""
        begins_in_s = 0.0 if self.idle else self.busy_for_s
        return self.left_s is None or begins_in_s + need_s + self.margin_s <= self.left_s

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


def choose(
    queue: FairQueue,
    seats: Iterable[Seat],
    *,
    usual_s: float,
    longest_s: float = math.inf,
) -> tuple[Waiting, Seat] | None:
    """The next request that some worker can take, out of its queue, and that worker."""
    able = [seat for seat in seats if seat.idle or seat.may_prefetch]
    if not able:
        return None

    def fits(waiting: Waiting) -> bool:
        need_s = waiting.need_s(usual_s, longest_s)
        return any(seat.fits(need_s) for seat in able)

    waiting = queue.pop(fits)
    if waiting is None:
        return None
    need_s = waiting.need_s(usual_s, longest_s)
    seat = choose_seat(each for each in able if each.fits(need_s))
    return None if seat is None else (waiting, seat)


@dataclass(frozen=True, kw_only=True)
class Prefetched:
    """A lease that was taken ahead and has not started."""

    request: str
    holder: str
    holder_busy_for_s: float


def choose_steal(
    seats: Iterable[Seat], prefetched: Iterable[Prefetched], *, usual_s: float = 0.0
) -> Prefetched | None:
    """A lease to take back when a worker idles and nothing is queued: the one that would wait longest.

    A worker whose end is too near for a usual request is not idle in this sense: it could not take the lease.
    """
    idle = {seat.peer for seat in seats if seat.idle and seat.fits(usual_s)}
    if not idle:
        return None
    candidates = [
        each for each in prefetched if each.holder not in idle and each.holder_busy_for_s > 0
    ]
    return max(candidates, key=lambda each: each.holder_busy_for_s, default=None)


class FairQueue:
    """The queued requests of one deployment, in round-robin order over owners.

    Pure; no operation scans the queue but `order`, and `pop` when what is first does not fit.
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

    def pop(self, fits: Callable[[Waiting], bool] | None = None) -> Waiting | None:
        """Take the next request out (of those that fit), and count the turn of its owner."""
        heads = [
            (self._turns.get(owner, 0), *first, owner)
            for owner in list(self._lines)
            if (first := self._first(owner, fits))
        ]
        if not heads:
            return None
        _, _, request_id, owner = min(heads)
        if self._lines[owner][0][1] == request_id:
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

    def _first(self, owner: str, fits: Callable[[Waiting], bool] | None) -> tuple[int, str] | None:
        """The first of a line that fits; a line is walked only when its head does not."""
        head = self._head(owner)
        if head is None or fits is None or fits(self._waiting[head[1]]):
            return head
        line = sorted(each for each in self._lines[owner] if each[1] in self._waiting)
        return next((each for each in line if fits(self._waiting[each[1]])), None)

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
