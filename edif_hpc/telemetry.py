"""Logs: one line per event, for people on a terminal and for machines in a file.

A log call names its event by a stable key, `extra={"event": "request_ended", …}`; the key and the other extras are printed
as `key=value`, or as JSON. Payloads, tokens and keys are never logged.

Much of what is logged or shown was written by strangers: names, errors, what a scheduler says. `printable` makes it harmless
for whoever looks: a terminal obeys control characters, and a newline could forge a line of its own.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {
    "message",
    "asctime",
    "taskName",
    "color_message",
}


#: Control characters but tab and newline, marks that reverse the direction of text, other ends of lines, half characters.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with everything that a terminal obeys shown instead, as Python writes it; tabs and newlines stay."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class LineFormatter(logging.Formatter):
    """`time LEVEL process event key=value … : message`."""

    def __init__(self, process: str, *, as_json: bool = False) -> None:
        super().__init__()
        self._process, self._as_json = process, as_json

    def format(self, record: logging.LogRecord) -> str:
        """One record as one line, and its traceback below."""
        extras = {
            key: value
            for key, value in vars(record).items()
            if key not in _STANDARD and not key.startswith("_")
        }
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        message = record.getMessage()
        if self._as_json:
            body = {
                "at": when,
                "level": record.levelname.lower(),
                "process": self._process,
                "message": message,
                **extras,
            }
            return json.dumps(body | ({"trace": trace.strip()} if trace else {}), default=str)
        event = extras.pop("event", record.name)
        pairs = "".join(
            f" {key}={_short(value)}" for key, value in extras.items() if value is not None
        )
        line = f"{when} {record.levelname:<7} {self._process} {event}{pairs}: {one_line(message)}"
        return printable(line + trace.replace("\n", "\n    "))


def set_up_logging(level: str, *, process: str, as_json: bool = False) -> None:
    """Send all logs of this process to its standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter(process, as_json=as_json))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "uvicorn", "websockets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def one_line(text: str) -> str:
    """The text with its newlines shown instead."""
    return text.replace("\n", "\\n")


def _short(value: Any) -> str:
    text = one_line(str(value))
    return json.dumps(text) if " " in text else text
