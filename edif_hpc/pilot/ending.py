"""By when an allocation has to be empty, and how one learns of it.

    a timer of ours      on the granted end of the walltime, which administrators may move: it is asked for again
    SIGUSR2, SIGUSR1     the scheduler's warning before that end. It may come a minute early, or never, so it counts only if the
                         end is not known. Far from the end it means preemption, at sites that warn of it so.
    SIGTERM, SIGINT      it ends now: scancel, preemption, a node that goes down; SIGKILL follows after the site's KillWait
    the relay            refuses us. (It tells the worker to drain by itself, and knows of this only that the worker left.)

Whichever comes first begins the drain; what comes later can only bring the end nearer. A drain lets requests end for as
long as there is time, then they are given back to the relay, which runs them elsewhere.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Final

from edif_hpc.clock import Clock

#: What is left of a walltime when the worker must be gone: for the last words, and since Slurm's clock is not ours.
LEAVE_S: Final = 15.0
#: What is left of it when the timer begins a drain. The relay does so earlier, if it can be reached.
DRAIN_S: Final = 75.0
#: After a scheduler's warning, if the end itself is not known.
WARNED_S: Final = 45.0
#: The earliest that the warning of an end may come: it is asked for two minutes ahead, and sent up to a minute before that.
WARNING_S: Final = 195.0

WARNINGS: Final = frozenset({signal.SIGUSR1, signal.SIGUSR2})

WALLTIME: Final = "its walltime ended"
SIGNALLED: Final = "the scheduler ended it (scancel, preemption, or its node goes down)"
REFUSED: Final = "refused by the relay"

#: What a worker is sent that does not end in time, by why: to give back what it runs.
CUT_SHORT: Final[Mapping[str, signal.Signals]] = MappingProxyType(
    {WALLTIME: signal.SIGUSR1, SIGNALLED: signal.SIGHUP, REFUSED: signal.SIGUSR1}
)


class Ending:
    """The end of one allocation, as far as it is known to be near."""

    def __init__(self, clock: Clock, *, term_s: float) -> None:
        self._clock = clock
        self.term_s = term_s  #: how long one may take that is sent SIGTERM
        self._at: float | None = None
        self._nearer = asyncio.Event()
        self._begun = asyncio.Event()
        self.cause = ""  #: what began it, or brought it nearer last

    @property
    def begun(self) -> bool:
        """Whether the worker is to leave."""
        return self._begun.is_set()

    @property
    def left_s(self) -> float | None:
        """How long the worker may take; None while nothing ends."""
        return None if self._at is None else max(0.0, self._at - self._clock.monotonic())

    def come(self, cause: str, *, within_s: float) -> None:
        """It ends within so many seconds."""
        at = self._clock.monotonic() + max(0.0, within_s)
        if self._at is None or at < self._at:
            self._at, self.cause = at, cause
            self._nearer.set()
        self._begun.set()

    def signalled(self, number: signal.Signals, left_s: float | None) -> None:
        """A signal came, with so much left of the walltime."""
        if number not in WARNINGS:
            self.come(SIGNALLED, within_s=self.term_s)
        elif left_s is None:
            self.come(WALLTIME, within_s=WARNED_S)
        elif left_s > WARNING_S:
            self.come(SIGNALLED, within_s=self.term_s)

    async def until_begun(self) -> None:
        """Wait until the worker is to leave."""
        await self._begun.wait()

    async def until_over(self) -> None:
        """Wait until it must have left, which may come nearer meanwhile."""
        await self._begun.wait()
        while left_s := self.left_s:
            self._nearer.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._nearer.wait(), timeout=left_s)
