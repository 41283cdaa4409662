"""What is in the folder of an executor, and how to be rid of it, whatever the code has made there.

Its owner is the user that the worker runs as, so names, depths and modes are an attacker's to choose: a path longer than the
kernel takes, a tree deeper than Python recurses, a folder that its owner cannot enter, a link to somewhere else. Nothing here
follows a link, builds a path from more than two names, or goes deeper into its own stack than the tree is wide.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from edif_hpc.worker.engine.walls.jail import FILES

#: Folders within each other; whoever has more of them wants to hide something.
DEPTH = 64
_BLOCK = 512  # what `st_blocks` counts in, whatever the file system


@dataclass(frozen=True, kw_only=True)
class Contents:
    """How much is there. With a complaint there is more than was counted."""

    bytes: int
    count: int
    complaint: str = ""


NOTHING = Contents(bytes=0, count=0)


class _Unfit(Exception):
    """The tree cannot be counted; says why."""


def mounted(root: Path) -> Contents:
    """Return what a file system holds that is mounted there."""
    told = os.statvfs(root)
    return Contents(
        bytes=(told.f_blocks - told.f_bfree) * told.f_frsize, count=told.f_files - told.f_ffree
    )


def contents(folder: Path, opened: Path) -> Contents:
    """Add up the files below a folder, and those that are deleted from its disk but still open.

    `opened` is a process's folder of descriptors in /proc.
    """
    found: dict[tuple[int, int], int] = {}
    complaint = ""
    root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        disk = os.fstat(root).st_dev
        for status in (*_below(root, DEPTH), *_deleted(opened, disk)):
            found[status.st_dev, status.st_ino] = status.st_blocks * _BLOCK
            if len(found) > FILES:
                break
    except _Unfit as error:
        complaint = str(error)
    finally:
        os.close(root)
    return Contents(bytes=sum(found.values()), count=len(found), complaint=complaint)


def _below(folder: int, depth: int) -> Iterator[os.stat_result]:
    """Yield the status of each entry below an open folder; what vanishes meanwhile is left out."""
    if not depth:
        raise _Unfit("folders too deep to be counted")
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    yield from _in(folder, entry.name, depth - 1)


def _in(folder: int, name: str, depth: int) -> Iterator[os.stat_result]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        inner = os.open(name, flags, dir_fd=folder)
    except PermissionError:
        raise _Unfit("a folder that cannot be read") from None
    try:
        yield from _below(inner, depth)
    finally:
        os.close(inner)


def _deleted(opened: Path, disk: int) -> Iterator[os.stat_result]:
    """Yield the files of a disk that a process has open and no folder has."""
    for name in os.listdir(opened):  # noqa: PTH208 - names suffice
        with suppress(FileNotFoundError):
            status = (opened / name).stat()
            if S_ISREG(status.st_mode) and not status.st_nlink and status.st_dev == disk:
                yield status


def removed(folder: Path) -> None:
    """Remove a folder and all in it, once nobody uses it any more.

    Each folder inside is first moved up into the outermost one, so that no path gets long.
    """
    todo = [folder]
    while todo:
        one = todo.pop()
        one.chmod(0o700)
        with os.scandir(one) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, 0o700)  # noqa: PTH101 - else it cannot be moved
                    todo.append(folder / secrets.token_hex(16))
                    os.rename(entry.path, todo[-1])  # noqa: PTH104
                else:
                    os.unlink(entry.path)  # noqa: PTH108
        if one != folder:
            one.rmdir()
    folder.rmdir()
