"""Whether a worker that ended is started again in the same allocation. Pure.

A worker that drained, or that the relay refuses, is not. One that died is, after a pause that doubles while it dies young;
after `MAX_YOUNG_DEATHS` in a row something is wrong that another start does not mend.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_YOUNG_DEATHS = 5
YOUNG_S = 60.0

_CAUSES = {0: "drained", 3: "refused by the relay"}


@dataclass(frozen=True, kw_only=True)
class Restart:
    """What to do next: leave with `cause`, or start again after `delay_s`."""

    cause: str | None = None
    delay_s: float = 0.0
    young_deaths: int = 0


def after_exit(before: Restart, *, code: int, lived_s: float, stopping: bool) -> Restart:
    """Decide after one exit of the worker."""
    if code in _CAUSES:
        return Restart(cause=_CAUSES[code])
    if stopping:
        return Restart(cause="stopped")
    young = before.young_deaths + 1 if lived_s < YOUNG_S else 0
    if young >= MAX_YOUNG_DEATHS:
        return Restart(
            cause=f"the worker died {young} times in a row within {YOUNG_S:.0f} s (last exit code {code})"
        )
    return Restart(
        delay_s=0.0 if young <= 1 else min(30.0, 2.0 ** (young - 2)), young_deaths=young
    )
