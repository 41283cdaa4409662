"""What the fleet looks like from outside: nnsight's `/status` and `/env`, and our own `ps`. Reads only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from edif_hpc.domain.allocation import Allocation
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.request import Provision
from edif_hpc.relay.seats import Worker


def nnsight_status(
    deployments: Iterable[Deployment],
    workers: Iterable[Worker],
    provisions: Mapping[str, tuple[Provision, str]],
) -> dict[str, Any]:
    """The `deployments` of `/status`: one entry a replica, or one for a deployment that has none.

    RUNNING is said of a warm worker alone, because scripts use it as a gate.
    """
    entries: dict[str, Any] = {}
    serving = [each for each in workers if not each.draining]
    for deployment in deployments:
        mine = [each for each in serving if each.peer.deployment == deployment.name]
        for worker in mine:
            state = "RUNNING" if worker.serves else "DEPLOYING"
            level = "HOT" if worker.serves else "WARM"
            entries[f"{deployment.name}/{worker.peer.slot}"] = _entry(deployment, level, state) | {
                "isolation": worker.facts.get("isolation"),
                "dtype": deployment.dtype,
                "commit": worker.facts.get("commit"),
            }
        if not mine:
            provision, why = provisions[deployment.name]
            state = "NOT_STARTED" if provision is Provision.NONE else "DEPLOYING"
            entries[deployment.name] = _entry(deployment, "WARM", state) | {"why": why}
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


def _entry(deployment: Deployment, level: str, state: str) -> dict[str, Any]:
    return {
        "deployment_level": level,
        "application_state": state,
        "model_key": deployment.model_key.render(),
        "repo_id": deployment.repo_id,
        "revision": deployment.revision,
        "task": deployment.task,
        "trust_remote_code": deployment.trust_remote_code,
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
        line["detail"] = worker.detail or allocation.detail
        line["worker"] = {
            "state": worker.state,
            "progress": worker.progress,
            "isolation": worker.facts.get("isolation"),
            "isolation_missing": worker.facts.get("isolation_missing", []),
            "executors": worker.executors,
            "leases": len(worker.leases),
            "running": sum(1 for each in worker.leases.values() if each.started_at is not None),
            "silent_s": round(now - worker.heard_at, 1),
            "versions": worker.facts.get("versions", {}),
        }
    return line
