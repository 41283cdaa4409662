"""Time as a thing that is passed in.

Two times exist here. *Monotonic* seconds measure durations: leases, deadlines, back-off. They mean
nothing outside the process that read them, so they are never stored or sent. *Wall* seconds (Unix
time) name a moment to people and to other machines: rows, log lines, expiry dates. They may jump.

Whoever needs to know what time it is takes a `Clock`; pure code takes `now` as an argument. The
tests pass `edif_hpc.testing.clock.ManualClock` and move it by hand, so none of them ever waits.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Tells both times. Implementations: `SystemClock`, and `ManualClock` for tests."""

    def monotonic(self) -> float:
        """Return seconds that never go back, from an arbitrary start."""
        ...

    def wall(self) -> float:
        """Return Unix time in seconds, as people and other machines know it."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        """Return seconds that never go back, from an arbitrary start."""
        return time.monotonic()

    def wall(self) -> float:
        """Return Unix time in seconds, as people and other machines know it."""
        return time.time()
