"""Why an executor died: what the wait status, the memory counters and the limits say together."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from edif_hpc.worker.engine.messages import Exited
from edif_hpc.worker.engine.values import MIB, FailureKind, Limits


def oom_kills() -> int:
    """Return how many processes of this control group the kernel has killed for memory, if it counts."""
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            file = Path(f"/sys/fs/cgroup{path}/memory.events")
        elif "memory" in controllers.split(","):
            file = Path(f"/sys/fs/cgroup/memory{path}/memory.oom_control")
        else:
            continue
        for entry in _lines(file):
            name, _, count = entry.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


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


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except OSError:
        return []
