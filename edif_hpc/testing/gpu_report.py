"""What `check_gpu` found, as a page for docs/reference: facts of the machine, and a section for each way of weights.

A section begins with the name of the devices and the way, as `VERIFIED_GPUS` has them, and says how many of its lines hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_HEAD: Final = re.compile(
    r"^## (?P<name>.+)\n\n(?P<held>\d+) of (?P<asked>\d+) hold", re.MULTILINE
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    held: bool
    seen: str


def report(
    facts: Mapping[str, Any], sections: Mapping[str, Sequence[Finding]], *, day: str
) -> str:
    """The page."""
    lines = [
        f"# {facts['device']}",
        "",
        f"What `scripts/check-gpu` found on {day}.",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {_cell(str(value))} |" for name, value in facts.items()),
    ]
    for name, findings in sections.items():
        lines += ["", *_section(name, findings)]
    return "\n".join(lines) + "\n"


def verified(page: str) -> set[str]:
    """The sections of a page in which everything held."""
    return {each["name"] for each in _HEAD.finditer(page) if each["held"] == each["asked"]}


def _section(name: str, findings: Sequence[Finding]) -> Iterator[str]:
    yield f"## {name}"
    yield ""
    yield f"{sum(each.held for each in findings)} of {len(findings)} hold."
    yield ""
    yield "| what | held | seen |"
    yield "|---|---|---|"
    for each in findings:
        yield f"| {each.what} | {'yes' if each.held else '**no**'} | {_cell(each.seen)} |"


def _cell(text: str) -> str:
    return text.replace("|", "/")
