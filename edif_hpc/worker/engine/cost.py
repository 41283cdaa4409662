"""What a job used, measured on this side of the walls where it can be.

What an executor says of itself may be untrue, so the worker counts what it sees: how long it ran, what it printed, and from the
kernel, once the process is reaped, its CPU time and peak. An inline result does not wait for that; then the executor's own word
stands for these two, which harms nobody but the researcher whose code it was.
"""

from __future__ import annotations

from dataclasses import dataclass

from edif_hpc.worker.engine.messages import Exited
from edif_hpc.worker.engine.request.console import Meter
from edif_hpc.worker.engine.values import Outcome, Plain, Saved


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one job, over all its runs."""

    runtime_s: float = 0.0
    cpu_s: float | None = None
    peak_rss_bytes: int | None = None
    log_lines: int = 0
    log_bytes: int = 0
    #: What it changed of weights that it shared, and how long putting that right took.
    restored: int = 0
    restore_s: float = 0.0

    def __add__(self, more: Cost) -> Cost:
        return Cost(
            runtime_s=self.runtime_s + more.runtime_s,
            cpu_s=_sum(self.cpu_s, more.cpu_s),
            peak_rss_bytes=max(self.peak_rss_bytes or 0, more.peak_rss_bytes or 0) or None,
            log_lines=self.log_lines + more.log_lines,
            log_bytes=self.log_bytes + more.log_bytes,
            restored=self.restored + more.restored,
            restore_s=self.restore_s + more.restore_s,
        )

    def told(self, outcome: Outcome) -> dict[str, Plain]:
        """The part of `meta` that tells it."""
        known: dict[str, Plain] = {
            "runtime_s": round(self.runtime_s, 6),
            "log_lines": self.log_lines,
            "log_bytes": self.log_bytes,
            "result_bytes": outcome.size if isinstance(outcome, Saved) else 0,
        }
        if self.cpu_s is not None:
            known["cpu_s"] = round(self.cpu_s, 6)
        if self.peak_rss_bytes is not None:
            known["peak_rss_bytes"] = self.peak_rss_bytes
        if self.restore_s:
            known |= {"restored_tensors": self.restored, "restore_s": round(self.restore_s, 6)}
        return known


def measured(
    outcome: Outcome,
    *,
    runtime_s: float,
    meter: Meter | None,
    began_cpu_s: float,
    exited: Exited | None,
) -> Cost:
    """The cost of one run; `exited` once its process is reaped, `began_cpu_s` what that had used before the run."""
    cpu_s, peak = outcome.meta.get("cpu_s"), outcome.meta.get("peak_rss_bytes")
    if exited is not None:
        cpu_s, peak = max(0.0, exited.cpu_s - began_cpu_s), exited.peak_rss_bytes
    return Cost(
        runtime_s=runtime_s,
        cpu_s=cpu_s if isinstance(cpu_s, float) else None,
        peak_rss_bytes=peak if isinstance(peak, int) else None,
        log_lines=meter.lines if meter is not None else 0,
        log_bytes=meter.bytes if meter is not None else 0,
        restored=exited.restored if exited is not None else 0,
        restore_s=exited.restore_s if exited is not None else 0.0,
    )


def _sum(one: float | None, other: float | None) -> float | None:
    return other if one is None else one + (other or 0.0)
