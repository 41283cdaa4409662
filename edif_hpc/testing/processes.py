"""The processes of a stack, found by looking instead of remembering.

A pilot starts workers, a worker a zygote, a zygote executors; a test that wants to kill one of them, or to know that none
is left, did not start most of them. Each of them names the stack's folder in its command line or in the environment that
it was started with, so `/proc` tells them apart from everything else on the machine, and by kind.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")

#: What a command line holds, and what kind of process that is.
_KINDS: Mapping[bytes, str] = {
    b"edif_hpc.testing.relay\0": "relay",
    b"edif_hpc.pilot.app\0": "pilot",
    b"edif_hpc.testing.noop_worker\0": "worker",
    b"edif_hpc.worker.app\0": "worker",
    b"edif_hpc.worker.engine.zygote\0": "zygote",
    b"edif_hpc.testing.client_process\0": "client",
}


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process as `/proc` shows it."""

    pid: int
    parent: int
    kind: str  #: relay, pilot, worker, zygote, executor, client, or other
    command: str

    def kill(self, number: int = signal.SIGKILL) -> bool:
        """Send a signal; False if it is gone already."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def processes_of(folder: Path) -> list[Process]:
    """All living processes (no zombies) that name `folder` when looked at, by pid."""
    mark = os.fsencode(folder)
    found: dict[int, Process] = {}
    for entry in sorted(
        (each for each in _PROC.iterdir() if each.name.isdigit()), key=lambda each: int(each.name)
    ):
        with suppress(OSError):  # it ended while we looked
            process = _look(entry, mark)
            if process is not None and process.pid != os.getpid():
                found[process.pid] = process
    return [_executor_or_itself(each, found) for each in found.values()]


def is_alive(pid: int) -> bool:
    """Whether a process runs, that is, exists and is no zombie."""
    with suppress(OSError):
        return _state(_PROC / str(pid))[0] not in "ZX"
    return False


def _look(entry: Path, mark: bytes) -> Process | None:
    command = (entry / "cmdline").read_bytes()
    if mark not in command and mark not in (entry / "environ").read_bytes():
        return None
    state, parent = _state(entry)
    if state in "ZX":
        return None
    kind = next((kind for text, kind in _KINDS.items() if text in command), "other")
    shown = command.replace(b"\0", b" ").decode(errors="replace").strip()
    return Process(pid=int(entry.name), parent=parent, kind=kind, command=shown)


def _state(entry: Path) -> tuple[str, int]:
    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
    return state, int(parent)


def _executor_or_itself(process: Process, all_of_them: Mapping[int, Process]) -> Process:
    """An executor is a fork of a zygote, and looks like it but for its parent."""
    parent = all_of_them.get(process.parent)
    if process.kind != "zygote" or parent is None or parent.kind == "worker":
        return process
    return Process(
        pid=process.pid, parent=process.parent, kind="executor", command=process.command
    )
