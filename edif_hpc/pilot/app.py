"""The pilot's main: `python -m edif_hpc.pilot.app ORDER`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from edif_hpc.clock import SystemClock
from edif_hpc.errors import EdifError
from edif_hpc.pilot.runtime import Pilot
from edif_hpc.slurm.order import PilotOrder, read_pilot_order
from edif_hpc.telemetry import set_up_logging


async def _serve(order: PilotOrder) -> str:
    pilot = Pilot(order=order, clock=SystemClock(), environ=dict(os.environ))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, pilot.stop)
    return await pilot.run()


def main(argv: list[str]) -> int:
    """Run one pilot; the exit code is 0 if it left in order."""
    try:
        path = Path(argv[1])
        order = read_pilot_order(path)
        path.unlink()  # the join token is for one use
        set_up_logging(order.engine.log_level, process="pilot")
        asyncio.run(_serve(order))
    except EdifError as error:
        sys.stderr.write(f"pilot: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
