"""What memory a process has, and making this one cheap to fork.

A fork copies one page table entry for every 4 KiB of ordinary memory, and the child's end takes them
down again: with torch and transformers imported that is 8 ms and 12 ms. The heaps are therefore
gathered into huge pages first, where one entry stands for 2 MiB, which leaves 2 ms each (kernel 6.1 and
newer; an older one refuses, and everything works as before, slower).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.worker.engine.walls import syscalls

HUGE = 2 * 1024 * 1024
_PRIVATE = ("RssAnon", "VmSwap", "VmPTE", "HugetlbPages")


def settle() -> None:
    """Collect garbage for the last time, keep what is left out of later collections, gather heaps."""
    gc.collect()
    gc.freeze()
    syscalls.libc().malloc_trim(0)
    for start, end in _heaps():
        first, last = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if last <= first:
            continue
        try:
            syscalls.madvise(first, last - first, syscalls.MADV_HUGEPAGE)
            syscalls.madvise(first, last - first, syscalls.MADV_COLLAPSE)
            # What an executor allocates later comes in small pages again: zeroing 2 MiB takes long.
            syscalls.madvise(first, last - first, syscalls.MADV_NOHUGEPAGE)
        except OSError:
            continue  # only slower: no such advice in this kernel, or no huge page free


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a process has of memory."""

    private: int  #: its own pages, in memory or in swap, and the tables that say where they are
    mapped: int  #: all that it could touch
    threads: int = 1
    shared: int = 0  #: of mappings that others may have as well


def data_bytes() -> int:
    """Return how much memory this process has that counts against RLIMIT_DATA."""
    return _status(Path("/proc/self"))["VmData"] * 1024


def living(process: Path) -> Path | None:
    """Return where in /proc a process can be looked at; nothing if it ends or has ended.

    That may be one of its threads: of a process whose first thread has ended nothing else is to be seen.
    """
    if "VmSize" in _status(process):
        return process
    tasks = process / "task"
    return next((each for each in tasks.iterdir() if "VmSize" in _status(each)), None)


def held(process: Path) -> Held:
    """Return what the process has that is looked at there; 0 of all if it ends.

    Raises:
        OSError: it is not there.
    """
    told = _status(process)
    return Held(
        private=sum(told.get(each, 0) for each in _PRIVATE) * 1024,
        mapped=told.get("VmSize", 0) * 1024,
        threads=told["Threads"],
    )


def shared(process: Path) -> dict[str, int]:
    """Return what a process maps that is memory, and no file or device: each with its size, as far as it is mapped."""
    found: dict[str, int] = {}
    for line in (process / "maps").read_text().splitlines():
        span, mode, offset, device, inode, *name = line.split(maxsplit=5)
        if mode.endswith("s") and name and (name[0].startswith("[") or "(deleted)" in name[0]):
            start, end = (int(part, 16) for part in span.split("-"))
            key = f"{device} {inode}"
            found[key] = max(found.get(key, 0), end - start + int(offset, 16))
    return found


def _status(process: Path) -> dict[str, int]:
    lines = (line.split() for line in (process / "status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if words[1:] and words[1].isdigit()}


def _heaps() -> Iterator[tuple[int, int]]:
    """Yield the writable mappings that no file is behind."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, _, inode, *name = line.split()
        if mode.startswith("rw-p") and inode == "0" and (not name or name == ["[heap]"]):
            start, end = (int(part, 16) for part in span.split("-"))
            yield start, end
