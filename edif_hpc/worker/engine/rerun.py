"""Running a request a second time, with gradients, when it turned out to need them.

A graph that nobody walks costs memory, so gradients are tracked only when the request speaks of them
(`fidelity`). A request can need them without a word of it: a library does the backward pass, or the name
is put together at run time. Then it fails, and torch says why; the executor passes that on, and the
request runs again, once, in a fresh executor, with gradients tracked and with the same seed, so that
what the researcher gets is what a local run computes.

Prints are sent while the first run goes on: a researcher watches a long loop by them, and nobody knows
yet that it will fail. What is out cannot be taken back, so the second run leaves out what was already
said: each of its lines that equals one of the first run's, as often as the first run said it. Equality
rather than position, since a warning more or less must not shift all that follows. A line that differs
(a time, a tensor that now shows its `grad_fn`) is sent.

Both runs share one allowance of wall time, and `meta` tells that there were two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from edif_hpc.worker.engine.values import Failed


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One run of a job in one executor."""

    #: What all random generators begin from.
    seed: int
    #: Track gradients even if the request does not speak of them.
    gradients: bool
    #: How long it may take.
    wall_s: float


@dataclass(frozen=True, kw_only=True)
class Lacked(Failed):
    """It failed because no gradients were tracked; a run that tracks them may end otherwise."""


class Said:
    """Passes on what is printed, and in a second run only what the first did not say."""

    def __init__(self, on_log: Callable[[str], None]) -> None:
        self._on_log = on_log
        self._lines: Counter[str] = Counter()

    def first(self, line: str) -> None:
        """Pass on a line of the first run."""
        self._lines[line] += 1
        self._on_log(line)

    def again(self, line: str) -> None:
        """Pass on a line of the second run, unless the first said it."""
        if self._lines[line] > 0:
            self._lines[line] -= 1
        else:
            self._on_log(line)
