"""What the researcher's code prints, as LOG lines.

Locally, `print`, `warnings.warn` and a library's logger all end on the terminal. To end at the client
instead, they must hold on to one stream object whose other end can change: the zygote puts a `Console`
in place of `sys.stdout` and `sys.stderr` before it imports anything, and an executor connects it.

A line goes out as soon as it is complete, a very long one in pieces. A loop that prints for ever must not flood the link: the
line that goes over a limit ends the request, from within `print` and whatever thread that is in, so that no handler of the
researcher's stands in the way. The worker counts again (`Meter`), because code can also write to the socket itself.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import NoReturn, TextIO

from edif_hpc.domain.limits import Limits, overrun
from edif_hpc.errors import OverLimit

#: A longer line goes out in pieces.
LINE_CHARACTERS = 16 * 1024

Send = Callable[[str], None]


class Meter:
    """Counts what is printed, by both streams together."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.lines = 0
        self.bytes = 0

    def over(self, text: str) -> OverLimit | None:
        """Count a line; or leave it out and tell which limit it would go over."""
        size = len(text.encode(errors="replace"))
        if self.lines + 1 > self._limits.log_lines:
            return self._overrun("log_lines")
        if self.bytes + size > self._limits.log_bytes:
            return self._overrun("log_bytes")
        self.lines += 1
        self.bytes += size
        return None

    def _overrun(self, name: str) -> OverLimit:
        happened = "the request was ended because it printed more than it may; what it printed until then was delivered"
        return overrun(self._limits, name, happened)


class Allowance:
    """Sends lines while they may be printed; the first that may not be goes to `end` instead, which does not return."""

    def __init__(self, meter: Meter, send: Send, end: Callable[[OverLimit], NoReturn]) -> None:
        self._meter, self._send, self._end = meter, send, end
        self._turn = threading.RLock()

    def line(self, text: str) -> None:
        """Send one line."""
        with self._turn:
            over = self._meter.over(text)
            if over is not None:
                self._end(over)
            self._send(text)


class Console(io.TextIOBase):
    """A text stream that hands on whole lines; what is written before it is connected goes `aside`, if anywhere."""

    def __init__(self, *, aside: TextIO | None = None) -> None:
        self._aside = aside
        self._line: Callable[[str], None] | None = None
        self._rest = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding that code which asks will expect."""
        return "utf-8"

    def connect(self, line: Callable[[str], None] | None) -> None:
        """From now on hand lines to `line`; what was begun before is forgotten."""
        self._line, self._rest = line, ""

    def writable(self) -> bool:
        """Tell that this is a stream to write to."""
        return True

    def write(self, text: str) -> int:
        """Take text; hand on the lines that it completes."""
        if self._line is None:
            if self._aside is not None:
                self._aside.write(text)
            return len(text)
        # A carriage return redraws a line (progress bars): only its last state is one.
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._hand_on(line.rsplit("\r", 1)[-1])
        if len(self._rest) > LINE_CHARACTERS:
            rest = self._rest.rsplit("\r", 1)[-1]
            begun = len(rest) % LINE_CHARACTERS
            self._rest = rest[len(rest) - begun :]
            if len(rest) > begun:
                self._hand_on(rest[: len(rest) - begun])
        return len(text)

    def finish(self) -> None:
        """Hand on a last line that no newline ended."""
        if self._rest:
            self._hand_on(self._rest.rsplit("\r", 1)[-1])
        self._rest = ""

    def _hand_on(self, line: str) -> None:
        if self._line is not None:
            for start in range(0, max(len(line), 1), LINE_CHARACTERS):
                self._line(line[start : start + LINE_CHARACTERS])
