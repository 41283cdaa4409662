"""From the wire's words to the engine's and back. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.limits import COSTS, limits_of
from edif_hpc.domain.request import FailureKind
from edif_hpc.wire import messages as m
from edif_hpc.worker.engine.values import EngineInfo, Failed, Job, Outcome

_MESSAGE_CHARS = 60_000
_SHOWN_VERSIONS = ("nnsight", "torch", "transformers")


def job_of(grant: m.Grant, blob: bytes | Path) -> Job:
    """What the engine is to run."""
    return Job(
        request_id=grant.request,
        attempt=grant.attempt,
        blob=blob,
        compress=grant.compress,
        env=grant.env,
        model_key=grant.model_key,
        limits=limits_of(grant.limits, grant.limit_sources),
    )


def done_of(grant: m.Grant, outcome: Outcome, parts: list[m.Part] | None) -> m.Done:
    """What the relay is told of an attempt that ended with an answer; `parts` if its result went up."""
    request, attempt = grant.request, grant.attempt
    if isinstance(outcome, Failed):
        return m.Done(
            request=request,
            attempt=attempt,
            error=str(outcome.kind),
            message=outcome.message[-_MESSAGE_CHARS:],
            meta=outcome.meta,
        )
    inline = (outcome.inline or b"") if parts is None else None
    return m.Done(
        request=request,
        attempt=attempt,
        size=outcome.size,
        inline=inline,
        parts=parts,
        meta=outcome.meta,
    )


def lease_end(outcome: Outcome) -> LeaseEnd | None:
    """How a lease ended whose executor died without an answer: the relay decides whether it runs again."""
    if not isinstance(outcome, Failed):
        return None
    if outcome.kind in (FailureKind.CRASH, FailureKind.ENGINE):
        return LeaseEnd.EXECUTOR_CRASH
    killed = outcome.kind is FailureKind.OOM and outcome.meta.get("killed")
    return LeaseEnd.OOM if killed else None


def spent_of(outcome: Outcome) -> dict[str, str]:
    """What an attempt had used whose executor died, as evidence."""
    return {name: str(outcome.meta[name]) for name in COSTS if name in outcome.meta}


def facts_of(info: EngineInfo) -> dict[str, Any]:
    """What the relay, `/env`, `ps` and every result's `meta` are told of a worker."""
    versions = {name: info.packages[name] for name in _SHOWN_VERSIONS if name in info.packages}
    unverified = {"unverified": True} if info.unverified else {}
    return unverified | {
        "commit": info.commit,
        "adapters": dict(info.adapters),
        "dtype": info.dtype,
        "weights": info.weights,
        "device": f"{info.device} ({info.device_name})" if info.device_name else info.device,
        "isolation": str(info.isolation.level),
        "isolation_missing": list(info.isolation.missing),
        "versions": versions | {"python": info.python_version.split()[0]},
        "python_version": info.python_version,
        "packages": dict(info.packages),
        "weights_bytes": info.weights_bytes,
        "load_s": round(info.load_s, 2),
        "attn_implementation": info.attn_implementation,
        "tasks": dict(info.tasks),
        "random_weights": dict(info.random_weights),
        "stores": list(info.stores),
        "libraries": list(info.libraries),
    }
