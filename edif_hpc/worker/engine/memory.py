"""Making this process cheap to fork.

A fork copies one page table entry for every 4 KiB of ordinary memory, and the child's end takes them
down again: with torch and transformers imported that is 8 ms and 12 ms. The heaps are therefore
gathered into huge pages first, where one entry stands for 2 MiB, which leaves 2 ms each (kernel 6.1 and
newer; an older one refuses, and everything works as before, slower).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

from edif_hpc.worker.engine import syscalls

HUGE = 2 * 1024 * 1024


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


def data_bytes() -> int:
    """Return how much memory this process has that counts against RLIMIT_DATA."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmData")


def _heaps() -> Iterator[tuple[int, int]]:
    """Yield the writable mappings that no file is behind."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, _, inode, *name = line.split()
        if mode.startswith("rw-p") and inode == "0" and (not name or name == ["[heap]"]):
            start, end = (int(part, 16) for part in span.split("-"))
            yield start, end
