"""What to do about an error that the walls have caused.

A library that meets a wall reports it in its own words: `Operation not permitted` from somewhere in subprocess, or that a hub
cannot be reached. A researcher cannot know from that whether the request is wrong, or the place. So such errors are
recognised by what raised them, and one sentence says what is not allowed here, and what is instead. The traceback stays.
"""

from __future__ import annotations

import errno
import traceback
from collections.abc import Iterable, Sequence
from pathlib import PurePath

from edif_hpc.domain.levels import Level, Rule, rule

_REFUSED = frozenset({errno.EPERM, errno.EACCES, errno.EROFS})
#: What huggingface_hub and datasets raise while they are told to stay off the network; datasets only names it in a text.
_OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError")
#: The files of libraries that start processes, or make what processes share.
_PROCESSES = frozenset(
    [
        "popen_fork.py",
        "popen_spawn_posix.py",
        "popen_loky_posix.py",
        "popen_forkserver.py",
        "subprocess.py",
        "resource_tracker.py",
        "synchronize.py",
        "util.py",
    ]
)
_STARTING = ("os.fork(", "os.forkpty(", "os.posix_spawn(", "os.posix_spawnp(", "os.popen(")


def about(chain: Iterable[BaseException], level: Level, stores: Sequence[str]) -> str:
    """Say what to do about an error, given with those that led to it; empty if no wall caused it."""
    for error in chain:
        if _wants_the_network(error):
            there = f"stores here: {', '.join(stores)}" if stores else "this worker has no store"
            return f"{_sentence(rule('network'), level)} ({there}; edif-hpc env tells)."
        if _wants_processes(error):
            return f"{_sentence(rule('processes'), level)}."
    return ""


def _sentence(broken: Rule, level: Level) -> str:
    """The rule that was met. Below `no-namespaces` it is not promised, but what was seen is so."""
    return f"At level {level} of isolation a request cannot {broken.what}: {broken.instead}"


def _wants_the_network(error: BaseException) -> bool:
    names = [type(error).__name__, *([str(error)] if isinstance(error, ConnectionError) else [])]
    if any(offline in name for name in names for offline in _OFFLINE):
        return True
    file, _ = _raised_at(error)
    if isinstance(error, EOFError):  # a manager that could not open its socket
        return file == "connection.py" and "managers.py" in _files(error)
    return type(error).__name__ == "gaierror" or (_refused(error) and file == "socket.py")


def _wants_processes(error: BaseException) -> bool:
    if not _refused(error):
        return False
    file, line = _raised_at(error)
    return file in _PROCESSES or any(each in line for each in _STARTING)


def _refused(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _REFUSED


def _raised_at(error: BaseException) -> tuple[str, str]:
    """The name of the file that raised it, and the line."""
    frames = traceback.extract_tb(error.__traceback__)
    return (PurePath(frames[-1].filename).name, frames[-1].line or "") if frames else ("", "")


def _files(error: BaseException) -> set[str]:
    return {PurePath(each.filename).name for each in traceback.extract_tb(error.__traceback__)}
