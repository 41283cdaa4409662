"""The pilot's main: `python -m edif_hpc.pilot.app ORDER`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from edif_hpc.clock import SystemClock
from edif_hpc.errors import EdifError, LaunchError
from edif_hpc.pilot.runtime import Pilot
from edif_hpc.slurm.order import PilotOrder, read_pilot_order
from edif_hpc.slurm.site import Site, load_site
from edif_hpc.telemetry import set_up_logging

_log = logging.getLogger(__name__)


async def _serve(order: PilotOrder, site: Site | None) -> str:
    pilot = Pilot(order=order, clock=SystemClock(), environ=dict(os.environ), site=site)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        loop.add_signal_handler(number, pilot.signalled, number)
    return await pilot.run()


def main(argv: list[str]) -> int:
    """Run one pilot; the exit code is 0 if it left in order."""
    try:
        order = _order(Path(argv[1]))
        set_up_logging(order.engine.log_level, process="pilot")
        asyncio.run(_serve(order, _site(order)))
    except (EdifError, OSError) as error:
        sys.stderr.write(f"pilot: {error}\n")
        return 1
    return 0


def _order(path: Path) -> PilotOrder:
    """Read it, once: its join token is for one use."""
    try:
        order = read_pilot_order(path)
    except FileNotFoundError as error:
        raise LaunchError(
            f"there is no order at {path}; a job that was requeued has none, its successor takes over"
        ) from error
    path.unlink()
    return order


def _site(order: PilotOrder) -> Site | None:
    """The facts to submit a successor by; without them that is left to a launcher."""
    if not order.site_file:
        return None
    try:
        return load_site(Path(order.site_file))
    except (EdifError, OSError) as error:
        extra = {"event": "no_site", "reason": str(error)}
        _log.warning("this pilot submits no successor: %s", error, extra=extra)
        return None


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
