"""The control groups that this process is in: where a scheduler or a container sets its limits of memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def memory_groups(mounted: Path = _ROOT, own: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """Yield the folders of this process's memory groups, the innermost first; those that cannot be seen are left out."""
    for line in lines(own):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = mounted
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
        else:
            continue
        group = top / path.lstrip("/")
        yield from (each for each in (group, *group.parents) if each.is_relative_to(top))


def lines(file: Path) -> list[str]:
    """Return the lines of a file; none if it cannot be read."""
    try:
        return file.read_text().splitlines()
    except OSError:
        return []


def number(file: Path, name: str = "") -> int | None:
    """Return the number in a file, or in its line `name`; None if there is none ("max")."""
    for line in lines(file):
        label, _, value = line.rpartition(" ")
        if label == name and value.isdigit():
            return int(value)
    return None
