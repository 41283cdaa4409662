"""How things are shown: tables for people, JSON for programs, a line of progress for those who wait.

Most of what is shown was written by others: researchers, workers, schedulers. All that a command writes passes `Plain`, so no
text of theirs moves the cursor, changes the title of a terminal or hides a line; there is no other way out (`plainly`).
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from edif_hpc.telemetry import one_line, printable

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


_COLOURS = re.compile(
    "(\x1b\\[(?:0|1|36)m)"
)  # bold, cyan, and their end: all that we use ourselves


class Plain:
    """A stream that shows control characters instead of sending them; `raw` is the one beneath."""

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        """Write it, harmless."""
        parts = _COLOURS.split(text)
        parts[::2] = map(printable, parts[::2])
        self.raw.write("".join(parts))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


@contextlib.contextmanager
def plainly() -> Iterator[None]:
    """Let everything that is written meanwhile pass `Plain`."""
    with (
        contextlib.redirect_stdout(Plain(sys.stdout)),
        contextlib.redirect_stderr(Plain(sys.stderr)),
    ):
        yield


def talking(*, as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """What is told on the way goes to stdout, or to stderr if that is for JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_json(value: Any) -> None:
    """Print JSON."""
    click.echo(json.dumps(value, indent=2))


def listing(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, none: str) -> None:
    """Print a table of these columns; `none` if there are no rows."""
    cells = [[one_line(_cell(row.get(column))) for column in columns] for row in rows]
    if not cells:
        click.echo(none)
        return
    table = [[column.replace("_", " ").upper() for column in columns], *cells]
    widths = [max(len(row[index]) for row in table) for index in range(len(columns))]
    for row in table:
        click.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def facts(values: Mapping[str, Any]) -> None:
    """Print names and values, one a line."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        indented = _cell(value).replace("\n", "\n" + " " * (width + 2))
        click.echo(f"{name.replace('_', ' '):<{width}}  {indented}")


def moment(at: float | None) -> str | None:
    """A time of the relay's clock, in this machine's zone."""
    if at is None:
        return None
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """A length of time, rounded as people say it."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if days >= 2:
        return f"{days:.0f} d"
    if hours >= 2:
        return f"{hours:.0f} h"
    return f"{minutes:.0f} min" if minutes >= 2 else f"{seconds:.0f} s"


def size(count: float) -> str:
    """A number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


class Progress:
    """One line on stderr that says where long work is: rewritten on a terminal, else printed when it changes."""

    def __init__(self) -> None:
        self._shown = ""
        self._terminal = sys.stderr.raw if isinstance(sys.stderr, Plain) else sys.stderr
        self._rewrite = sys.stderr.isatty()

    def tell(self, text: str, *, passing: bool = False) -> None:
        """Show where it is now; what is `passing` only where it can be rewritten."""
        if text == self._shown or (passing and not self._rewrite):
            return
        self._shown = text
        if self._rewrite:
            click.echo(f"\r\x1b[K{printable(one_line(text))}", file=self._terminal, nl=False)
        else:
            click.echo(text, err=True)

    def end(self) -> None:
        """Leave the line."""
        if self._rewrite and self._shown:
            click.echo(err=True)
        self._shown = ""


def _cell(value: Any) -> str:
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict() | list():
            return json.dumps(value)
        case _:
            return str(value)
