"""The outlook: what is known now of a request that has not ended, gathered for `lines`.

Who is ahead in the queue and for how long, what its deployment has, which worker has it and when that was heard last. A
queue is walked once for all who listen to it, and not at all if nobody does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from edif_hpc.clock import Clock
from edif_hpc.domain.dispatch import Waiting
from edif_hpc.domain.estimate import rest_s, start_in_s
from edif_hpc.domain.lease import LeaseClock
from edif_hpc.domain.request import Request
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.lines import Ahead, Held
from edif_hpc.relay.seats import Worker

#: A worker that was not heard for so many heartbeats is called silent.
SILENT_BEATS = 2


@dataclass(kw_only=True)
class _Seats:
    """The executors of a deployment's workers: when each is free, and whose requests they have."""

    owners: Counter[str] = field(default_factory=Counter)
    free_in_s: list[float] = field(default_factory=list)
    unstarted: int = 0
    paused_s: float = 0.0


class Outlook:
    """Gathers facts. `heartbeat_s` is the pause between a worker's heartbeats."""

    def __init__(
        self, *, fleet: Fleet, leases: LeaseClock, clock: Clock, heartbeat_s: float
    ) -> None:
        self._fleet, self._leases, self._clock = fleet, leases, clock
        self._silent_s = SILENT_BEATS * heartbeat_s

    def ahead(
        self, deployment: str, order: Iterable[Waiting], owner_of: Callable[[str], str]
    ) -> Iterator[tuple[Waiting, Ahead]]:
        """Each queued request with what it waits behind, in the order in which they will be taken."""
        mean_s = self._fleet.times(deployment).mean_s
        seats = self._seats(deployment, mean_s, owner_of)
        owners, running = seats.owners, seats.owners.total()
        for place, waiting in enumerate(order, start=1):
            before = seats.unstarted + place - 1
            yield (
                waiting,
                Ahead(
                    place=place,
                    requests=running + place - 1,
                    people=len(owners),
                    mine=owners.get(waiting.owner, 0),
                    start_s=start_in_s(seats.free_in_s, before, mean_s),
                    paused_s=seats.paused_s,
                ),
            )
            owners[waiting.owner] += 1

    def held(self, request: Request, *, begun: bool, again: str) -> Held:
        """A request that a worker has."""
        key, now = request.holder or "", self._clock.monotonic()
        worker = self._fleet.workers.get(key)
        holding = worker.leases.get(request.id) if worker is not None else None
        if holding is not None and holding.attempt != request.attempt:
            holding = None
        since = None
        if holding is not None:
            since = holding.started_at if begun else holding.granted_at
        return Held(
            place=self._place(request),
            for_s=None if since is None else max(0.0, now - since),
            wall_s=request.limits.wall_s if begun else None,
            begun=begun,
            attempt=request.attempt,
            again=again,
            sent=holding.sent if holding is not None else 0,
            size=holding.size if holding is not None else 0,
            silent_s=self._silence(worker, now),
            lease_left_s=self._leases.left_s(request.id, now),
        )

    def _silence(self, worker: Worker | None, now: float) -> float | None:
        if worker is None:
            return None
        silent_s = now - worker.heard_at
        return silent_s if silent_s > self._silent_s else 0.0

    def _seats(
        self, deployment: str, mean_s: float | None, owner_of: Callable[[str], str]
    ) -> _Seats:
        seats, now = _Seats(), self._clock.monotonic()
        for worker in self._fleet.serving(deployment):
            seats.owners.update(map(owner_of, worker.leases))
            begun = [
                now - each.started_at
                for each in worker.leases.values()
                if each.started_at is not None
            ]
            seats.unstarted += len(worker.leases) - len(begun)
            if mean_s is not None:
                seats.free_in_s += [rest_s(mean_s, ran_s) for ran_s in begun]
            paused_s = worker.pause.left_s(now)
            seats.paused_s = max(seats.paused_s, paused_s)
            seats.free_in_s += [paused_s] * max(0, worker.executors - len(begun))
        return seats

    def _place(self, request: Request) -> str:
        peer = self._fleet.peer(request.holder or "")
        if peer is None:
            return "a worker"
        node = self._fleet.node(peer.key)
        slot = f"{peer.deployment}/{peer.slot}"
        return f"{slot} ({node})" if node else slot
