"""What serves a deployment now: nothing, an allocation that waits, a worker that loads, or one that is warm.

One look at the fleet gives the state that a waiting client is shown (`Provision`) and the words for it. How long the
last load took is learned from the workers themselves, and after a start of the relay from the allocations' events.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from edif_hpc.domain.allocation import PENDING, Allocation, AllocationEvent, AllocationState
from edif_hpc.domain.request import Provision
from edif_hpc.relay import lines
from edif_hpc.relay.jobs import Jobs
from edif_hpc.relay.seats import Worker
from edif_hpc.store.base import Store


def provision(
    deployment: str,
    *,
    workers: Iterable[Worker],
    allocations: Iterable[Allocation],
    jobs: Jobs,
    last_load_s: float | None,
    now: float,
    wall: float,
) -> tuple[Provision, str]:
    """What serves a deployment, and the words on it for those who wait; of several, the furthest counts."""
    mine = [each for each in workers if each.peer.deployment == deployment and not each.draining]
    if any(each.serves for each in mine):
        return Provision.WARM, ""
    if mine:
        furthest = min(mine, key=lambda each: (each.state == "failed", each.since))
        return Provision.LOADING, _loading(furthest, last_load_s, now)
    live = [each for each in allocations if each.deployment == deployment]
    coming = [each for each in live if each.state is not AllocationState.DRAINING]
    started = [each for each in coming if each.state not in PENDING]
    if started:
        return Provision.LOADING, lines.starting(node=started[0].node)
    if coming:
        first = min(coming, key=lambda each: each.submitted_at)
        return Provision.PENDING, lines.pending(
            job=first.job_id,
            for_s=max(0.0, wall - first.submitted_at),
            why=jobs.of(first.id).reason or first.detail,
            start_in_s=jobs.start_in_s(first.id, now),
        )
    return Provision.NONE, lines.nothing(deployment, leaving=bool(live))


def last_loads(store: Store) -> dict[str, float]:
    """How long the newest allocation of each deployment took from its worker's first word until it was warm."""
    warm = [each for each in store.allocations(live_only=False) if each.warm_at is not None]
    newest = {each.deployment: each.id for each in warm}
    took = {name: _load_s(store.allocation_events(each)) for name, each in newest.items()}
    return {name: seconds for name, seconds in took.items() if seconds is not None}


def _load_s(events: Sequence[AllocationEvent]) -> float | None:
    at = {each.event: each.at for each in reversed(events)}  # the first of each kind
    begun, warm = at.get(AllocationState.LOADING), at.get(AllocationState.WARM)
    return None if begun is None or warm is None else max(0.0, warm - begun)


def _loading(worker: Worker, last_load_s: float | None, now: float) -> str:
    if worker.state == "failed":
        return lines.failing()
    return lines.loading(
        lines.Load(
            stage=worker.detail,
            done=worker.done,
            total=worker.total,
            for_s=max(0.0, now - worker.since),
            last_s=last_load_s,
        )
    )
