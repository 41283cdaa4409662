"""Kinds of arguments that several commands take."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, ClassVar

import click

_UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_BYTES = {
    "B": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4,
    "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(_BYTES)})")
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


class Size(click.ParamType[int]):
    """A number of bytes as `512MiB`, `8GB` or `1.5GiB`."""

    name = "size"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Bytes."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value)
        if match is None:
            self.fail(f"{value!r} is no size; write 512MiB, 8GB or 1.5GiB", param, ctx)
        return int(float(match[1]) * _BYTES[match[2]])


class Nothing(Enum):
    """What `none` on the command line becomes; None itself is an option that was not given."""

    NONE = "none"


class OrNone(click.ParamType[Any]):
    """Another kind, or the word `none`, which takes back what was set before."""

    NONE: ClassVar = Nothing.NONE

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self._kind = kind
        self.name = f"{'count' if isinstance(kind, click.IntRange) else kind.name}|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The other kind's value, or `NONE`."""
        return self.NONE if value in ("none", self.NONE) else self._kind.convert(value, param, ctx)
