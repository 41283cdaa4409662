"""Connected workers and what they hold, as the relay sees them. Memory only.

Who a worker is follows from the CURVE key of its connection (`peer`), never from what it says; `facts` is what it says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.domain.allocation import Peer
from edif_hpc.domain.dispatch import Seat
from edif_hpc.domain.estimate import RunTimes
from edif_hpc.domain.pause import Pause


@dataclass(kw_only=True)
class Holding:
    """A lease as its worker's record has it; times are monotonic seconds."""

    attempt: int
    granted_at: float
    started_at: float | None = None
    seen: bool = False  #: the worker has named it in a heartbeat
    steal_asked_at: float = -math.inf
    sent: int = 0  #: bytes of its result that the store has
    size: int = 0  #: bytes of its result, once it has run


@dataclass(kw_only=True, eq=False)
class Worker:
    """A connected worker."""

    peer: Peer
    nonce: str
    state: str
    heard_at: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    since: float = 0.0  #: when it first spoke, monotonic: its load began then
    detail: str = ""  #: while it loads, the stage; else its last words
    progress: float | None = None
    done: int = 0  #: bytes of the stage, where they are known
    total: int = 0
    window: int = 0
    executors: int = 1
    draining: bool = False
    leases: dict[str, Holding] = field(default_factory=dict)
    pause: Pause = field(default_factory=Pause)

    @property
    def serves(self) -> bool:
        """Whether it may be given leases."""
        return self.state == "warm" and not self.draining

    def seat(
        self, now: float, times: RunTimes, *, left_s: float | None = None, margin_s: float = 0.0
    ) -> Seat:
        """This worker as `domain.dispatch` sees it; one that pauses takes nothing."""
        running = [
            times.remaining_s(now - each.started_at)
            for each in self.leases.values()
            if each.started_at is not None
        ]
        waiting = len(self.leases) - len(running)
        busy_for_s = (min(running) if running else 0.0) + (
            times.typical_s * max(0, waiting - 1 if running else waiting)
        )
        return Seat(
            peer=self.peer.key,
            executors=self.executors,
            held=len(self.leases),
            window=0 if self.pause.left_s(now) else self.window,
            busy_for_s=busy_for_s,
            left_s=left_s,
            margin_s=margin_s,
        )
