"""Processes that one command starts and must not leave behind.

A process that its parent outlives is handed by the kernel to the nearest ancestor that asked for such orphans. `adopt_orphans`
asks for them, so that whatever is started from here, at any depth and in any session, ends up as a child of this process:
"nothing is left running" is then a question that the process table answers. Children get SIGTERM first, because for a pilot
that means to drain, and SIGKILL when their time is over.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from edif_hpc.errors import LaunchError

_PR_SET_CHILD_SUBREAPER = 36
_INTERVAL_S = 0.05
_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that is still meant when its number has been used again: by when it was started, too."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process of that number; None if there is none, or only its record."""
        fields = _stat(pid)
        return (
            None if fields is None or fields[0] == "Z" else cls(pid=pid, started=int(fields[19]))
        )

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Signal it, if it still runs."""
        with suppress(ProcessLookupError):
            if self.alive:
                os.kill(self.pid, number)

    def as_dict(self) -> dict[str, int]:
        """For a file."""
        return asdict(self)


def adopt_orphans() -> None:
    """Become the parent of what our descendants leave behind."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start(
    arguments: Sequence[str],
    *,
    environ: Mapping[str, str],
    log: Path,
    until: str,
    timeout_s: float,
) -> str:
    """Start a module as a server in a session of its own; returns its first line that holds `until`.

    Raises:
        LaunchError: it ended, or did not say so in time; the message holds the end of its log.
    """
    log.touch(mode=0o600)
    command = [sys.executable, "-u", "-m", *arguments]
    files = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_APPEND, 0),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    pid = os.posix_spawn(command[0], command, dict(environ), file_actions=files, setsid=True)
    started, deadline = Process.of(pid), time.monotonic() + timeout_s
    while (alive := started is not None and started.alive) and time.monotonic() < deadline:
        for line in log.read_text(errors="replace").splitlines():
            if until in line:
                return line
        time.sleep(_INTERVAL_S)
    state = f"did not get ready within {timeout_s:.0f} s" if alive else "ended"
    tail = " | ".join(log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
    raise LaunchError(f"{' '.join(arguments[:3])} {state}: {tail or 'it said nothing'}")


def children() -> list[Process]:
    """The living children of this process; those that have ended are buried."""
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    own = [pid for pid, parent in _parents() if parent == os.getpid()]
    return [each for each in map(Process.of, own) if each is not None]


def end_children(grace_s: float) -> list[Process]:
    """End all children and what they leave behind; returns those that only SIGKILL could end."""
    told: set[Process] = set()
    killed: set[Process] = set()
    deadline = time.monotonic() + grace_s
    while left := children():
        over = time.monotonic() >= deadline
        for each in set(left) - (killed if over else told):
            each.send(signal.SIGKILL if over else signal.SIGTERM)
            (killed if over else told).add(each)
        time.sleep(_INTERVAL_S)
    return sorted(killed, key=lambda each: each.pid)


def end(processes: Iterable[Process], grace_s: float) -> None:
    """End processes that are not our children, by the same rule."""
    left = list(processes)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for each in left:
            each.send(number)
        deadline = time.monotonic() + grace_s
        while any(each.alive for each in left) and time.monotonic() < deadline:
            time.sleep(_INTERVAL_S)


def _parents() -> Iterator[tuple[int, int]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))) is not None:
            yield int(entry.name), int(fields[1])


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name: state, parent, …; None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()
