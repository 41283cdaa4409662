"""The log of an allocation: what its pilot, its worker and the container said, in one file on the site's shared folder.

submitit names it after the job. Where the folder cannot be seen from here (another cluster, another machine), the relay has
the last words of allocations that have ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edif_hpc.cli.watch import watch

_TAIL_BYTES = 64 << 10


def log_of(folder: Path) -> Path | None:
    """The newest log in an allocation's folder; None if there is none, or none that can be read here."""
    try:
        found = [(each.stat().st_mtime, each) for each in folder.glob("*_log.out")]
    except OSError:
        return None
    return max(found, default=(0.0, None))[1]


def tail(folder: Path, count: int) -> list[str]:
    """The last lines of that log."""
    log = log_of(folder)
    return [] if log is None else read_end(log, count)[0]


def read_end(log: Path, count: int) -> tuple[list[str], int]:
    """The last lines of a log, and how far it has been read."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
        return lines[-count:], file.tell()


def follow(log: Path, since: int) -> Iterator[str]:
    """What is added to a log after it was read so far, for ever."""
    with log.open("rb") as file:
        file.seek(since)
        for added in watch(file.read):
            if added:
                yield added.decode(errors="replace")
