"""What one request may use, and who says so.

Three say it: the *relay* (for everybody), the *deployment* and the *token*. Each may leave any limit open (`Allowed`); the
request gets the lowest of what is said (`agreed`) and remembers by whom, so that the error that ends it names the one to ask
(`overrun`). Limits are fixed when a request is accepted and are stored with it: what an operator changes later holds for
later requests.

Seconds are wall-clock, sizes are bytes. The memory of a request is counted from what its executor holds before it begins: the
weights and libraries are nobody's. `None` is no limit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from edif_hpc.errors import InvalidInput, OverLimit

RELAY = "the relay"
GIB, MIB, KIB = 1 << 30, 1 << 20, 1 << 10
_BINARY = ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"))
_DECIMAL = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may use."""

    wall_s: float = 3600.0
    memory_bytes: int = 8 * GIB
    gpu_memory_bytes: int | None = None  #: of each GPU, beside the weights; None: all that is free
    result_bytes: int = 8 * GIB
    log_bytes: int = 1 * MIB
    log_lines: int = 10_000
    saved_tensors: int = 100_000
    scratch_bytes: int = 1 * GIB  #: of files in the executor's folder
    request_bytes: int = 1 * GIB  #: of itself, as it is sent
    sources: Mapping[str, str] = field(default_factory=dict)  #: who set a limit, by its name

    def numbers(self) -> dict[str, float]:
        """The limits that there are, by name."""
        return dict(_said(self))


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """What one of the three says; None: nothing."""

    wall_s: float | None = None
    memory_bytes: int | None = None
    gpu_memory_bytes: int | None = None
    result_bytes: int | None = None
    log_bytes: int | None = None
    log_lines: int | None = None
    saved_tensors: int | None = None
    scratch_bytes: int | None = None
    request_bytes: int | None = None

    def numbers(self) -> dict[str, float]:
        """What is said, by name."""
        return dict(_said(self))


SAYS_NOTHING = Allowed()
NAMES = tuple(each.name for each in fields(Allowed))

#: What an attempt used, by the names that `meta` has for it, also when the process died that was to tell.
COSTS = ("runtime_s", "cpu_s", "peak_rss_bytes", "log_lines", "log_bytes")

#: What a limit is of, and what a researcher can do who met it.
_WORDS: Mapping[str, tuple[str, str]] = {
    "wall_s": (
        "wall time",
        "Do less in one request: fewer prompts, tokens or layers, or split it into several",
    ),
    "memory_bytes": (
        "memory",
        "Use a smaller batch or fewer tokens, or save less (slice before .save(), a smaller dtype)",
    ),
    "gpu_memory_bytes": (
        "GPU memory",
        "Use a smaller batch or fewer tokens, save less (slice before .save()), or move what you keep within the block to "
        "the CPU (.cpu())",
    ),
    "result_bytes": (
        "the result's size",
        "Save less: slice before .save(), fewer layers or tokens, a smaller dtype",
    ),
    "log_bytes": ("printed text", "Print less, or save what you want to read"),
    "log_lines": ("printed lines", "Print less, or save what you want to read"),
    "saved_tensors": (
        "saved tensors",
        "Join them before they are saved (torch.stack, torch.cat), or save fewer",
    ),
    "scratch_bytes": (
        "temporary files",
        "Write less to the disk, or delete what is done with",
    ),
    "request_bytes": (
        "the request's size",
        "Everything that the traced block uses is sent with it: keep large tensors out of it, or make them inside the block",
    ),
}


def agreed(said: Mapping[str, Allowed]) -> Limits:
    """The lowest of each limit that is `said`, by whom; of equal ones the first counts. What nobody says is as in `Limits`."""
    lowest: dict[str, float] = {}
    sources: dict[str, str] = {}
    for source, allowed in said.items():
        for name, value in _said(allowed):
            if name not in lowest or value < lowest[name]:
                lowest[name], sources[name] = value, source
    return limits_of(lowest, sources)


def limits_of(numbers: Mapping[str, float], sources: Mapping[str, str]) -> Limits:
    """Limits from their numbers, as they travel; names that are not known here are passed over."""
    known: dict[str, Any] = {
        name: _typed(name, numbers[name]) for name in NAMES if name in numbers
    }
    return Limits(**known, sources={name: sources[name] for name in NAMES if name in sources})


def checked(allowed: Allowed) -> Allowed:
    """The same, or `InvalidInput` for a limit that nothing could keep."""
    for name, value in _said(allowed):
        if not (value > 0 and math.isfinite(value)):
            raise InvalidInput(
                f"the limit {name} is {value}; it must be above 0, or null for none"
            )
    return allowed


def overrun(limits: Limits, name: str, happened: str, **seen: Any) -> OverLimit:
    """The error that tells a researcher what went over which limit, who set it, and what to do; `seen` joins its facts."""
    value, source = getattr(limits, name), limits.sources.get(name)
    noun, advice = _WORDS[name]
    by = f", set by {source}" if source else ""
    return OverLimit(
        f"{happened}: its limit of {noun} is {amount(name, value)}{by}. {advice}; or ask your operator for a higher limit.",
        {"limit": name, "value": value, "source": source} | seen,
    )


def amount(name: str, value: float | None) -> str:
    """A limit's value for people."""
    if value is None:
        return "no limit"
    if name == "wall_s":
        return f"{value:g} s"
    return _as_said(int(value)) if name.endswith("_bytes") else f"{value:,.0f}"


def size(count: int) -> str:
    """A number of bytes in the largest unit in which it is exact enough."""
    unit, name = _unit(count, _BINARY)
    return f"{round(count / unit, 2):g} {name}"


def _as_said(count: int) -> str:
    """A size that somebody chose: 1.5GB is told as that, and not as 1.4 GiB."""
    unit, name = _unit(count, _DECIMAL)
    if count % _unit(count, _BINARY)[0] == 0 or count * 10 % unit:
        return size(count)
    return f"{count / unit:g} {name}"


def _unit(count: int, units: tuple[tuple[int, str], ...]) -> tuple[int, str]:
    return next((each for each in units if count >= each[0]), (1, "bytes"))


def _said(limits: Limits | Allowed) -> Iterator[tuple[str, float]]:
    for name in NAMES:
        value = getattr(limits, name)
        if value is not None:
            yield name, value


def _typed(name: str, value: float) -> float:
    return float(value) if name == "wall_s" else int(value)
