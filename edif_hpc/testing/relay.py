"""A relay process for tests: `python -m edif_hpc.testing.relay [OFFSET_FILE]`, set by `EDIF_RELAY_…` alone.

It is `relay.app` as it is served, but for one thing: with an offset file, the wall clock is the machine's plus the seconds
that the file holds at that moment. So a test sets the clock back by an hour under a running relay.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from edif_hpc.clock import Clock, SystemClock
from edif_hpc.errors import EdifError
from edif_hpc.relay.app import Relay
from edif_hpc.settings import RelaySettings, load
from edif_hpc.telemetry import set_up_logging


class OffsetClock:
    """The machine's clock, with its wall time moved by what a file says."""

    def __init__(self, file: Path) -> None:
        self._file, self._system = file, SystemClock()

    def monotonic(self) -> float:
        """Return seconds that never go back."""
        return self._system.monotonic()

    def wall(self) -> float:
        """Return Unix time in seconds, moved."""
        return self._system.wall() + float(self._file.read_text() or 0)


async def _serve(settings: RelaySettings, clock: Clock) -> None:
    relay = Relay(settings, clock=clock)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, relay.stop)
    await relay.run()


def main(argv: list[str]) -> int:
    """Run one relay; an error is one line and exit code 1."""
    import uvloop

    settings = load(RelaySettings, flags={}, environ=os.environ)
    set_up_logging(settings.log_level, process="relay")
    clock = OffsetClock(Path(argv[1])) if len(argv) > 1 else SystemClock()
    try:
        uvloop.run(_serve(settings, clock))
    except EdifError as error:
        sys.stderr.write(f"relay: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
