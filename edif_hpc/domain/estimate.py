"""How long requests run, learned from those that ended.

Quantiles over the newest runs of a deployment, with a conservative prior while there are few. What has run longer than
its estimate is expected to run as long again: heavy tails make the past the best guess of the rest.

Decisions need a figure always, so they have the prior (`p90_s`, `typical_s`). People are told only what was seen: `mean_s`
is None until a first run has ended, and then nobody is told when something starts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
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

    @property
    def mean_s(self) -> float | None:
        """The mean of the runs that were seen; None if there was none."""
        return sum(self._runs) / len(self._runs) if self._runs else None

    def _figures(self) -> tuple[float, float]:
        if len(self._runs) < _ENOUGH:
            return PRIOR_S, PRIOR_S
        return quantiles(self._runs, n=10)[-1], sum(self._runs) / len(self._runs)

    def remaining_s(self, ran_s: float) -> float:
        """Expected rest of a run that has lasted `ran_s`."""
        return self.p90_s - ran_s if ran_s < self.p90_s else ran_s


def rest_s(mean_s: float, ran_s: float) -> float:
    """What a person is told of the rest of a run: up to the mean, then as long again."""
    return mean_s - ran_s if ran_s < mean_s else ran_s


def start_in_s(free_in_s: Sequence[float], ahead: int, mean_s: float | None) -> float | None:
    """When the request behind `ahead` others starts; None if that cannot be known.

    `free_in_s` says for each executor when it is free. The requests ahead take them in turn, and then keep them for the
    mean of a run: exact when runs are alike, and a fair guess else.
    """
    if not free_in_s:
        return None
    free = sorted(free_in_s)
    turns, seat = divmod(ahead, len(free))
    if turns == 0:
        return free[seat]
    return None if mean_s is None else free[seat] + turns * mean_s
