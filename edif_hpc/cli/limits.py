"""What requests may use, as options of the commands that set it and as words of those that show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import click

from edif_hpc.cli.params import Duration, OrNone, Size
from edif_hpc.domain.limits import amount

_F = TypeVar("_F", bound=Callable[..., Any])
_COUNT = click.IntRange(min=1)

_OPTIONS: Mapping[str, tuple[str, click.ParamType[Any], str]] = {
    "wall_s": ("--max-wall", Duration(), "Longest run of a request."),
    "memory_bytes": ("--max-memory", Size(), "Most memory of the host, beside the weights."),
    "gpu_memory_bytes": (
        "--max-gpu-memory",
        Size(),
        "Most memory of each GPU, beside the weights.",
    ),
    "result_bytes": ("--max-result", Size(), "Largest result."),
    "log_lines": ("--max-log-lines", _COUNT, "Most lines that a request prints."),
    "log_bytes": ("--max-log-bytes", Size(), "Most text that a request prints."),
    "saved_tensors": ("--max-saved", _COUNT, "Most tensors that a request saves."),
    "scratch_bytes": ("--max-scratch", Size(), "Most that a request keeps in files of its own."),
    "request_bytes": ("--max-request", Size(), "Largest request that is taken."),
}


def limit_options(command: _F) -> _F:
    """Let a command take limits; `said` reads them."""
    for name, (flag, kind, text) in reversed(list(_OPTIONS.items())):
        command = click.option(flag, name, type=OrNone(kind), help=text)(command)
    return command


def said(options: dict[str, Any]) -> dict[str, Any]:
    """Take the limits out of a command's options; as the relay takes them, without those that were not given."""
    given = {name: options.pop(name) for name in _OPTIONS}
    return {
        name: None if value is OrNone.NONE else value
        for name, value in given.items()
        if value is not None
    }


def given(limits: dict[str, Any]) -> dict[str, Any]:
    """The same; a command that only sets limits needs one at least."""
    if not limits:
        flags = ", ".join(flag for flag, _, _ in _OPTIONS.values())
        raise click.UsageError(f"give a limit to set: {flags}")
    return limits


def told(limits: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each limit by its flag, with its value in words and who set it."""
    for name, each in limits.items():
        if name in _OPTIONS:
            yield _OPTIONS[name][0], {**each, "value": amount(name, each["value"])}


def shown(limits: Mapping[str, Any]) -> str | None:
    """The limits that are set, in one line."""
    words = [
        f"{flag.removeprefix('--max-')} {amount(name, limits[name])}"
        for name, (flag, _, _) in _OPTIONS.items()
        if limits.get(name) is not None
    ]
    return ", ".join(words) or None
