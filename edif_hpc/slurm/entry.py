"""What a scheduler runs: become the pilot.

submitit installs handlers that ignore SIGTERM and that requeue on SIGUSR2. Replacing the process image throws them away,
and leaves submitit no result to pickle: the pilot's exit code is the job's.
"""

from __future__ import annotations

import os
import signal
import sys


def enter(order: str) -> None:
    """Replace this process by the pilot of an order."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGCONT):
        signal.signal(number, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, "-u", "-m", "edif_hpc.pilot.app", order])  # noqa: S606 - our own interpreter
