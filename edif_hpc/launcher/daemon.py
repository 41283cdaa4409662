"""The launcher as a daemon: rounds at an interval, and a longer pause while a round cannot be done.

A round that fails leaves nothing behind that the next one does not mend, whatever was wrong: a relay that is away or that refuses
what it was told, a shared folder that cannot be written. So the daemon says what it saw and goes on. Only a token that is not
good any more ends it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType

from edif_hpc.errors import EdifError, NotAuthenticated, NotPermitted, SettingsError
from edif_hpc.launcher.runtime import Launcher

MAX_PAUSE_S = 120.0


def serve(
    launcher: Launcher,
    *,
    interval_s: float,
    tell: Callable[[str], None],
    stop: threading.Event | None = None,
) -> None:
    """Go on until SIGTERM or SIGINT, or until `stop` is set.

    Raises:
        NotAuthenticated: the relay does not know this token; going on would not help. `NotPermitted` and `SettingsError` likewise.
    """
    stop = stop or _stopped_by_signals()
    pause_s, told = 0.0, ""
    while not stop.wait(pause_s):
        try:
            lines = launcher.round().lines()
        except (NotAuthenticated, NotPermitted, SettingsError):
            raise
        except (EdifError, OSError) as error:
            lines, pause_s = [str(error)], min(MAX_PAUSE_S, max(interval_s, 2 * pause_s))
        else:
            pause_s = interval_s
        said = "\n".join(lines)
        if said and said != told:
            tell(said)
        told = said


def _stopped_by_signals() -> threading.Event:
    stop = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return stop
