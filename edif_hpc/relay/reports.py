"""What the fleet looks like from outside: nnsight's `/status` and `/env`, and our own `ps`. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from edif_hpc.domain.allocation import RUNNING, Allocation
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.request import Provision
from edif_hpc.domain.succession import Decision
from edif_hpc.relay import lines
from edif_hpc.relay.jobs import Job
from edif_hpc.relay.seats import Worker


def nnsight_status(
    deployments: Iterable[Deployment],
    workers: Iterable[Worker],
    provisions: Mapping[str, tuple[Provision, str]],
) -> dict[str, Any]:
    """The `deployments` of `/status`: one entry a replica, or one for a deployment that has none.

    A further task of theirs has an entry of its own, because nnsight looks for a model and a task. RUNNING is said of a warm worker alone, because scripts use it as a gate.
    """
    entries: dict[str, Any] = {}
    serving = [each for each in workers if not each.draining]
    for deployment in deployments:
        mine = [each for each in serving if each.peer.deployment == deployment.name]
        for worker in mine:
            state = "RUNNING" if worker.serves else "DEPLOYING"
            level = "HOT" if worker.serves else "WARM"
            replica = f"{deployment.name}/{worker.peer.slot}"
            for name, entry in _entries(replica, deployment, level, state):
                entries[name] = entry | _of_worker(worker, entry["task"])
        if not mine:
            provision, why = provisions[deployment.name]
            state = "NOT_STARTED" if provision is Provision.NONE else "DEPLOYING"
            for name, entry in _entries(deployment.name, deployment, "WARM", state):
                entries[name] = entry | {"why": why}
    return entries


def environment(workers: Iterable[Worker]) -> dict[str, Any]:
    """The body of `/env`: Python and packages of the workers (all run one image; the newest warm one speaks)."""
    warm = [each for each in workers if each.serves and "packages" in each.facts]
    if not warm:
        return {"python_version": "", "packages": {}}
    facts = max(warm, key=lambda each: each.heard_at).facts
    return {"python_version": facts.get("python_version", ""), "packages": facts["packages"]}


def processes(
    allocations: Iterable[Allocation], workers: Iterable[Worker], now: float
) -> list[dict[str, Any]]:
    """One line an allocation, with its worker if one is connected."""
    by_allocation = {each.peer.allocation: each for each in workers}
    return [
        _line(each, by_allocation.get(each.id), now)
        for each in sorted(allocations, key=lambda a: (a.deployment, a.slot))
    ]


def _entries(
    name: str, deployment: Deployment, level: str, state: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    for key in deployment.model_keys:
        entry = {
            "deployment_level": level,
            "application_state": state,
            "model_key": key.render(),
            "repo_id": key.repo_id,
            "revision": key.revision,
            "task": key.task,
            "trust_remote_code": deployment.trust_remote_code,
            "dtype": deployment.dtype,
            "adapters": [each.repo_id for each in deployment.adapters],
        }
        yield name if key.task == deployment.task else f"{name} {key.task}", entry


def _of_worker(worker: Worker, task: str) -> dict[str, Any]:
    return {
        "isolation": worker.facts.get("isolation"),
        "device": worker.facts.get("device"),
        "weights": worker.facts.get("weights"),
        "unverified": worker.facts.get("unverified", False),
        "commit": worker.facts.get("commit"),
        "random_weights": worker.facts.get("random_weights", {}).get(task, []),
    }


def _line(allocation: Allocation, worker: Worker | None, now: float) -> dict[str, Any]:
    line: dict[str, Any] = {
        "allocation": allocation.id,
        "name": allocation.name,
        "deployment": allocation.deployment,
        "slot": allocation.slot,
        "generation": allocation.generation,
        "site": allocation.site,
        "job_id": allocation.job_id,
        "node": allocation.node,
        "state": str(allocation.state),
        "detail": allocation.detail,
        "submitted_at": allocation.submitted_at,
        "warm_at": allocation.warm_at,
        "worker": None,
    }
    if worker is not None:
        paused_s = worker.pause.left_s(now)
        line["detail"] = _pause(worker, paused_s) or worker.detail or allocation.detail
        line["worker"] = {
            "state": worker.state,
            "progress": worker.progress,
            "paused_s": round(paused_s, 1),
            "isolation": worker.facts.get("isolation"),
            "device": worker.facts.get("device"),
            "weights": worker.facts.get("weights"),
            "unverified": worker.facts.get("unverified", False),
            "isolation_missing": worker.facts.get("isolation_missing", []),
            "executors": worker.executors,
            "leases": len(worker.leases),
            "running": sum(1 for each in worker.leases.values() if each.started_at is not None),
            "silent_s": round(now - worker.heard_at, 1),
            "versions": worker.facts.get("versions", {}),
            "weights_bytes": worker.facts.get("weights_bytes"),
        }
    return line


def _pause(worker: Worker, paused_s: float) -> str:
    if not paused_s:
        return ""
    gave = f"gave {worker.pause.returns} lease(s) back in a row"
    return f"paused for {lines.duration(paused_s)}: {gave}, see its log"


def prospects(
    row: Allocation,
    job: Job,
    *,
    left_s: float | None,
    start_in_s: float | None,
    decision: Decision | None,
    lead_s: float | None,
    others: Iterable[Allocation],
) -> dict[str, Any]:
    """What is to come of an allocation: its end, its successor, and why it waits; for `ps`."""
    newer = [e for e in others if e.place == row.place and e.generation > row.generation]
    successor = max(newer, key=lambda each: each.generation, default=None)
    return {
        "walltime_min": row.walltime_min,
        "left_s": None if left_s is None else round(left_s, 1),
        "reason": job.reason or None,
        "start_in_s": None if start_in_s is None else round(start_in_s, 1),
        "order_holder": row.order_holder,
        "successor": None if successor is None else successor.name,
        "successor_due_s": _due_s(row, left_s, lead_s) if successor is None else None,
        "why": "" if decision is None else decision.why,
        "gap_s": 0.0 if decision is None else round(decision.gap_s, 1),
        "advice": "" if decision is None else decision.advice,
    }


def _due_s(row: Allocation, left_s: float | None, lead_s: float | None) -> float | None:
    """In how long its successor is ordered."""
    if row.state not in RUNNING or left_s is None or lead_s is None:
        return None
    return round(max(0.0, left_s - lead_s), 1)
