"""How long requests run, learned from those that ended.

Quantiles over the newest runs of a deployment, with a conservative prior while there are few. What has run longer than
its estimate is expected to run as long again: heavy tails make the past the best guess of the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import quantiles

PRIOR_S = 60.0
_ENOUGH = 8
_KEPT = 200


class RunTimes:
    """Run times of one deployment in seconds, the newest `_KEPT`."""

    def __init__(self, newest: Iterable[float]) -> None:
        self._runs: deque[float] = deque(newest, maxlen=_KEPT)
        self._p90: float | None = None

    def add(self, run_s: float) -> None:
        """One more run ended."""
        self._runs.append(run_s)
        self._p90 = None

    @property
    def p90_s(self) -> float:
        """A run is shorter than this nine times in ten; the prior while too few are known."""
        if self._p90 is None:
            self._p90 = quantiles(self._runs, n=10)[-1] if len(self._runs) >= _ENOUGH else PRIOR_S
        return self._p90

    @property
    def typical_s(self) -> float:
        """The mean run."""
        return sum(self._runs) / len(self._runs) if len(self._runs) >= _ENOUGH else PRIOR_S

    def remaining_s(self, ran_s: float) -> float:
        """Expected rest of a run that has lasted `ran_s`."""
        return self.p90_s - ran_s if ran_s < self.p90_s else ran_s
