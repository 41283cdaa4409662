"""Why an executor died: what the wait status, the memory counters and the limits say together."""

from __future__ import annotations

import os
import signal

from edif_hpc.worker.engine.messages import Exited
from edif_hpc.worker.engine.values import MIB, FailureKind, Limits
from edif_hpc.worker.engine.walls import cgroup


def oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed for memory, if it counts."""
    group = next(cgroup.memory_groups(), None)
    if group is None:
        return 0
    counts = (
        cgroup.number(group / each, "oom_kill") for each in ("memory.events", "memory.oom_control")
    )
    return next((each for each in counts if each is not None), 0)


def judge(exited: Exited, limits: Limits, *, out_of_memory: bool) -> tuple[FailureKind, str]:
    """Return the kind of failure and what to tell the researcher."""
    used = f"it had used {exited.peak_rss_bytes // MIB} MiB"
    if os.WIFEXITED(exited.status):
        code = os.WEXITSTATUS(exited.status)
        return FailureKind.CRASH, f"the code ended its own process with status {code}; {used}"
    number = os.WTERMSIG(exited.status)
    name = signal.Signals(number).name
    if number == signal.SIGKILL and out_of_memory:
        return FailureKind.OOM, (
            f"the kernel ended the process because memory ran out; {used}, and a request may use "
            f"{limits.memory_bytes // MIB} MiB: use a smaller batch, fewer tokens, or save less"
        )
    return FailureKind.CRASH, f"the process died of {name} while it ran the code; {used}"
