"""The folder of an allocation on its node: locked while the pilot lives, gone with it.

A pilot that is killed leaves its folder behind, perhaps with gigabytes of results. The next one on that node finds that nobody
holds the lock, and removes it. The kernel drops the lock with the process, so a living pilot's folder is never taken away.

Scratches are shared, like `/tmp`. All that we make there is in one folder of ours, which nobody else may write: whoever owned it, or a
link in its place, could put other files under the paths that we write to, run from, and remove.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edif_hpc.errors import LaunchError

_log = logging.getLogger(__name__)

_LOCK = "pilot.lock"


@contextmanager
def own_folder(path: Path, *, keep: bool) -> Iterator[Path]:
    """Make the folder, for us alone, and remove it in the end unless it is to be kept.

    Raises:
        LaunchError: it cannot be made, belongs to somebody else, or another pilot works in it.
    """
    try:
        _check_above(path.parent)
        path.mkdir(exist_ok=True, mode=0o700)
        fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise LaunchError(
            f"no scratch at {path} on {os.uname().nodename}: {error.strerror}; correct `scratch` of the site"
        ) from error
    with os.fdopen(fd, "w") as lock:
        facts = path.stat()
        if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
            raise LaunchError(f"others may write to {path}; correct `scratch` of the site")
        if not _locked(lock.fileno()):
            raise LaunchError(f"another pilot works in {path}")
        _sweep(path)
        try:
            yield path
        finally:
            if not keep:
                shutil.rmtree(
                    path, ignore_errors=True
                )  # of what stays, the next pilot tries again


def _check_above(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise LaunchError(
            f"{folder} on {os.uname().nodename} is a link, belongs to somebody else, or others may write to it; remove it, or "
            "correct `scratch` of the site"
        )


def _sweep(mine: Path) -> None:
    """Remove what pilots that are no more left beside us."""
    for lock in mine.parent.glob(f"*/{_LOCK}"):
        with suppress(OSError):  # somebody else's, or gone by now
            if lock.parent == mine or len(list(lock.parent.iterdir())) == 1:
                continue  # one with nothing but its lock may be about to take it
            fd = os.open(lock, os.O_RDWR)
            try:
                if _locked(fd):
                    extra = {"event": "scratch_swept", "folder": str(lock.parent)}
                    _log.info("removing what a pilot left behind", extra=extra)
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(fd)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
