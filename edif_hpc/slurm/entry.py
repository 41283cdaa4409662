"""What a scheduler runs: become the pilot.

submitit installs handlers that ignore SIGTERM and that requeue on SIGUSR2. Replacing the process image throws them away,
and leaves submitit no result to pickle: the pilot's exit code is the job's.

The batch script says which order is its job's (`ORDER`): of two that were submitted for one allocation either may have found the
other's pickle in their folder.
"""

from __future__ import annotations

import os
import signal
import sys

PILOT = "edif_hpc.pilot.app"
ORDER = "EDIF_HPC_ORDER"


def enter(order: str, module: str = PILOT) -> None:
    """Replace this process by the pilot of an order, or by another module of the same kind."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    for number in (
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):  # a warning that comes before anyone listens must not kill
        signal.signal(number, signal.SIG_IGN)
    order = os.environ.get(ORDER, order)  # noqa: TID251 - this is the start of a process
    os.execv(sys.executable, [sys.executable, "-u", "-m", module, order])  # noqa: S606 - our own interpreter
