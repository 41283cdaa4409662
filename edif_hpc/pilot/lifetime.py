"""How much of its walltime an allocation has left, by the node's own clock.

Slurm writes the end into the environment of a job (`SLURM_JOB_END_TIME`, since 23.02), and does not change it there when an
administrator moves the end; the controller knows. So it is asked for at the start if the variable is missing, every
`REFRESH_S`, when the scheduler warns, and once more when the end seems near. A controller that does not answer changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Final

from edif_hpc.clock import Clock
from edif_hpc.errors import SlurmUnavailable
from edif_hpc.pilot.ending import DRAIN_S, LEAVE_S, WALLTIME, WARNING_S, Ending

_log = logging.getLogger(__name__)

REFRESH_S: Final = 600.0
JOB_ID: Final = "SLURM_JOB_ID"
_END_TIME: Final = "SLURM_JOB_END_TIME"
_RESTARTS: Final = "SLURM_RESTART_COUNT"

Ask = Callable[[], float | None]  #: asks the controller; `SlurmUnavailable` if it does not answer


class Lifetime:
    """The job of one allocation. `ask` None: there is nobody to ask, the environment's word stands."""

    def __init__(
        self, environ: Mapping[str, str], *, clock: Clock, ending: Ending, ask: Ask | None
    ) -> None:
        self._clock, self._ending, self._ask = clock, ending, ask
        self._end: float | None = None  # monotonic
        self._warned = asyncio.Event()
        self.id = environ.get(JOB_ID)  #: the scheduler's
        self.restarts = int(environ.get(_RESTARTS) or 0)
        told = environ.get(_END_TIME, "")
        if told.isdigit():
            self._set(float(told) - clock.wall())

    @property
    def left_s(self) -> float | None:
        """Seconds that are left to serve; None if there is no end, or nobody knows of it."""
        known = [] if self._end is None else [max(0.0, self._end - self._clock.monotonic())]
        if (ends_in_s := self._ending.left_s) is not None:
            known.append(ends_in_s)
        return min(known, default=None)

    @property
    def may_have_moved(self) -> bool:
        """Whether a warning now, so far from the end that we know, may mean that it was moved, and there is somebody to ask."""
        return self._ask is not None and self._end is not None and (self.left_s or 0.0) > WARNING_S

    def warned(self) -> None:
        """The scheduler says that the end is near; perhaps it was moved. Look again how near."""
        self._warned.set()

    async def watch(self) -> None:
        """Begin the end when it is near; returns then."""
        if self._end is None:
            await self.refresh()
        # A short walltime is not all drain.
        drain_s = DRAIN_S if self.left_s is None else min(DRAIN_S, self.left_s / 8)
        while (left_s := self.left_s) is None or left_s > drain_s:
            rest_s = REFRESH_S if left_s is None else min(REFRESH_S, left_s - drain_s)
            if self._ask is None and left_s is None:
                return
            with suppress(TimeoutError):  # then it is time for a look at the clock
                await asyncio.wait_for(self._warned.wait(), timeout=rest_s)
            self._warned.clear()
            await self.refresh()
        self._ending.come(WALLTIME, within_s=left_s - min(LEAVE_S, drain_s / 2))

    def _set(self, left_s: float) -> None:
        self._end = self._clock.monotonic() + left_s

    async def refresh(self) -> None:
        """Ask how much is left; nothing changes if there is no answer."""
        if self._ask is None:
            return
        try:
            left_s = await asyncio.to_thread(self._ask)
        except SlurmUnavailable as error:
            extra = {"event": "end_unknown", "reason": str(error)}
            _log.warning("the scheduler was not heard about the end", extra=extra)
            return
        if left_s is not None:
            self._set(left_s)
