"""Kinds of arguments that several commands take."""

from __future__ import annotations

import re

import click

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|h|d)")


class Duration(click.ParamType[float]):
    """A length of time as `90s`, `30min`, `12h` or `7d`; seconds inside."""

    name = "duration"

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Seconds."""
        if isinstance(value, int | float):
            return float(value)
        match = _DURATION.fullmatch(value)
        if match is None:
            self.fail(f"{value!r} is no duration; write 90s, 30min, 12h or 7d", param, ctx)
        return float(match[1]) * _UNITS[match[2]]
