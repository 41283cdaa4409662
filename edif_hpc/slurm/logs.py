"""The log of an allocation: what its job, pilot, worker and container said, in one file on the site's shared folder.

submitit names it after the job. It is there even if the job died before any of our code ran, for want of a Python, say; so it
is where last words are looked for when nobody has said any.
"""

from __future__ import annotations

from pathlib import Path

_TAIL_BYTES = 64 << 10


def log_of(folder: Path, job_id: str | None = None) -> Path | None:
    """The log of a job in its allocation's folder, the newest one if no job is named; None if none can be read here."""
    try:
        found = [(each.stat().st_mtime, each) for each in folder.glob(f"{job_id or '*'}_*log.out")]
    except OSError:
        return None
    return max(found, default=(0.0, None))[1]


def tail(folder: Path, count: int, job_id: str | None = None) -> list[str]:
    """The last lines of that log."""
    log = log_of(folder, job_id)
    return [] if log is None else read_end(log, count)[0]


def read_end(log: Path, count: int) -> tuple[list[str], int]:
    """The last lines of a log, and how far it has been read."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
        return lines[-count:], file.tell()
