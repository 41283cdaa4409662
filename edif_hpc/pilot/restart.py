"""Whether a worker that ended is started again in the same allocation. Pure.

A worker that drained, that the relay refuses, or that is walled in less than its deployment demands, is not. One that died is, after a pause that doubles while it dies young;
after `MAX_YOUNG_DEATHS` in a row something is wrong that another start does not mend. One whose engine never started died
young, however long it loaded. Where less walltime is left than `WORTH_S`, the next generation serves sooner.
"""

from __future__ import annotations

from dataclasses import dataclass

from edif_hpc.slurm.order import WorkerExit

MAX_YOUNG_DEATHS = 5
YOUNG_S = 60.0
MAX_PAUSE_S = 30.0
WORTH_S = 120.0  #: loading, and a request or two

_CAUSES = {
    WorkerExit.DRAINED: "drained",
    WorkerExit.REFUSED: "refused by the relay",
    WorkerExit.TOO_WEAK: "isolation below the floor",
}


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What to do next: leave with `cause`, or start again after `delay_s`."""

    cause: str | None = None
    delay_s: float = 0.0
    young_deaths: int = 0


def after_exit(
    before: Restart, *, code: int, lived_s: float, ending: str, left_s: float | None
) -> Restart:
    """Decide after one exit of the worker. `ending` is why the allocation ends; empty if it does not."""
    if ending:
        return Restart(cause=ending)
    if code in set(_CAUSES):
        return Restart(cause=_CAUSES[WorkerExit(code)])
    if left_s is not None and left_s < WORTH_S:
        return Restart(cause=f"the worker died (exit code {code}) with {left_s:.0f} s left")
    died_young = lived_s < YOUNG_S or code == WorkerExit.ENGINE_FAILED
    young = before.young_deaths + 1 if died_young else 0
    if young >= MAX_YOUNG_DEATHS:
        return Restart(
            cause=f"the worker died young {young} times in a row (last exit code {code})"
        )
    pause_s = 0.0 if young <= 1 else min(MAX_PAUSE_S, 2.0 ** (young - 2))
    return Restart(delay_s=pause_s, young_deaths=young)
