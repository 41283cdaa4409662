"""What one look at something found, in words for who has to mend it: `doctor`, checks of sites, and probes of nodes speak so.

A check never raises for what it looks for: that is its finding.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Grade(StrEnum):
    """How a check ended."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found; `way_out` says what to do about it."""

    what: str
    grade: Grade
    seen: str
    way_out: str = ""

    def __str__(self) -> str:
        tail = f"; {self.way_out}" if self.way_out else ""
        return f"{self.grade:<4}  {self.what}: {self.seen}{tail}"

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return {"what": self.what, "grade": self.grade, "seen": self.seen, "way_out": self.way_out}


def ok(what: str, seen: str) -> Finding:
    """All is well."""
    return Finding(what=what, grade=Grade.OK, seen=seen)


def warn(what: str, seen: str, way_out: str = "") -> Finding:
    """It works, but not as it could."""
    return Finding(what=what, grade=Grade.WARN, seen=seen, way_out=way_out)


def fail(what: str, seen: str, way_out: str) -> Finding:
    """It does not work."""
    return Finding(what=what, grade=Grade.FAIL, seen=seen, way_out=way_out)
