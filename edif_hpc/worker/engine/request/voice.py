"""How an executor speaks: one frame at a time, and nothing after its last word.

The researcher's code may print in several threads while the result is written in another, and two frames that mix are a
broken protocol. A *last word* ends the process in the same breath, from whatever thread it is said in: no handler, no
`finally` and no `atexit` of the researcher's runs any more, and no other thread can speak.
"""

from __future__ import annotations

import os
import threading
from typing import Final, NoReturn, Protocol

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.messages import Broken, Done, Message
from edif_hpc.worker.engine.protocol import Channel


class Speaker(Protocol):
    """To whom a run tells how it goes."""

    def say(self, message: Message) -> None:
        """Send a message."""
        ...

    def end(self, message: Done | Broken) -> NoReturn:
        """Send the last message; this does not return."""
        ...


class Voice:
    """The executor's end of its channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._turn = threading.RLock()

    def say(self, message: Message) -> None:
        """Send a message."""
        with self._turn:
            self._channel.send(message)

    def end(self, message: Done | Broken) -> NoReturn:
        """Send the last message, and end this process."""
        self._turn.acquire()
        try:
            self._channel.send(message)
        finally:
            os._exit(0)


class Mute:
    """For a rehearsal: nobody listens."""

    def say(self, message: Message) -> None:
        """Say nothing."""

    def end(self, message: Done | Broken) -> NoReturn:
        """A rehearsal that is cut short was none."""
        raise EngineError(f"a rehearsal was cut short: {message}")


MUTE: Final = Mute()
