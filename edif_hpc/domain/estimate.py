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
_EVERY = 16


class RunTimes:
    """Run times of one deployment in seconds, the newest `_KEPT`."""

    def __init__(self, newest: Iterable[float]) -> None:
        self._runs: deque[float] = deque(newest, maxlen=_KEPT)
        self._unread = 0  # runs since the figures below were made
        self._p90, self._mean = self._figures()

    def add(self, run_s: float) -> None:
        """One more run ended. With many known, the figures follow every `_EVERY` runs: they are asked for far more often."""
        self._runs.append(run_s)
        self._unread += 1
        if self._unread >= _EVERY or len(self._runs) <= _EVERY:
            self._unread = 0
            self._p90, self._mean = self._figures()

    @property
    def p90_s(self) -> float:
        """A run is shorter than this nine times in ten; the prior while too few are known."""
        return self._p90

    @property
    def typical_s(self) -> float:
        """The mean run."""
        return self._mean

    def _figures(self) -> tuple[float, float]:
        if len(self._runs) < _ENOUGH:
            return PRIOR_S, PRIOR_S
        return quantiles(self._runs, n=10)[-1], sum(self._runs) / len(self._runs)

    def remaining_s(self, ran_s: float) -> float:
        """Expected rest of a run that has lasted `ran_s`."""
        return self.p90_s - ran_s if ran_s < self.p90_s else ran_s
