"""A pause for a worker that gives leases back.

A worker that cannot run anything (its scratch is full, its engine broken) returns each grant at once, and the same request
would come back to it in an endless, busy round. So a worker whose last lease came back is granted nothing for a
moment, which doubles with each further return and ends with the first answer. A lease that was stolen is no such sign (the
relay asked for it), nor one whose executor died: it ran, and what it ran is to blame. One person's crashes must not
make others wait.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from edif_hpc.domain.lease import LeaseEnd

NO_SIGN = frozenset({LeaseEnd.STOLEN, LeaseEnd.EXECUTOR_CRASH, LeaseEnd.OOM})
FIRST_S = 0.5
LONGEST_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Pause:
    """How a worker stands: leases returned since its last answer, and until when it is granted none (monotonic)."""

    returns: int = 0
    until: float = -math.inf

    def after(self, end: LeaseEnd, now: float) -> Pause:
        """A lease came back without an answer."""
        if end in NO_SIGN:
            return self
        pause_s = min(LONGEST_S, FIRST_S * 2 ** min(self.returns, 16))
        return Pause(returns=self.returns + 1, until=now + pause_s)

    def left_s(self, now: float) -> float:
        """How long it lasts from now on; 0 when it is over."""
        return max(0.0, self.until - now)
