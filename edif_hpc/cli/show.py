"""How things are shown: tables for people, JSON for programs, a line of progress for those who wait."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def talking(*, as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """What is told on the way goes to stdout, or to stderr if that is for JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_json(value: Any) -> None:
    """Print JSON."""
    click.echo(json.dumps(value, indent=2))


def listing(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, none: str) -> None:
    """Print a table of these columns; `none` if there are no rows."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
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
        click.echo(f"{name.replace('_', ' '):<{width}}  {_cell(value)}")


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
        self._rewrite = sys.stderr.isatty()

    def tell(self, text: str, *, passing: bool = False) -> None:
        """Show where it is now; what is `passing` only where it can be rewritten."""
        if text == self._shown or (passing and not self._rewrite):
            return
        self._shown = text
        click.echo(f"\r\x1b[K{text}" if self._rewrite else text, err=True, nl=not self._rewrite)

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
