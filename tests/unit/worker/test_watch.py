"""What is too much, and what is counted: without a process of another where one's own shows it."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from edif_hpc.domain.limits import Limits
from edif_hpc.worker.engine.walls.folders import Contents
from edif_hpc.worker.engine.walls.memory import held, living, shared
from edif_hpc.worker.engine.walls.watch import Sight, judged

OWN = Path("/proc/self")
MIB = 1 << 20
LIMITS = Limits(
    memory_bytes=100 * MIB, scratch_bytes=10 * MIB, sources={"memory_bytes": "the token ada"}
)


def sight(
    memory: int = 0,
    files: int = 0,
    count: int = 0,
    complaint: str = "",
    threads: int = 1,
    opened: int = 9,
) -> Sight:
    contents = Contents(bytes=files, count=count, complaint=complaint)
    return Sight(memory_bytes=memory, scratch=contents, threads=threads, descriptors=opened)


@pytest.mark.parametrize(
    ("seen", "limit", "words"),
    [
        (sight(memory=101 * MIB), "memory_bytes", "101 MiB of memory"),
        (sight(memory=101 * MIB), "memory_bytes", "100 MiB, set by the token ada"),
        (sight(files=11 * MIB), "scratch_bytes", "11 MiB of temporary files"),
        (sight(memory=101 * MIB, files=11 * MIB), "scratch_bytes", "temporary files"),
        (sight(count=70_000), "files", "70,000 temporary files; the limit is 65,536"),
        (sight(complaint="a folder that cannot be read"), "files", "a folder that cannot be read"),
        (sight(threads=2000), "processes", "2,000 threads and processes; the limit is 1,024"),
        (sight(threads=1024), "processes", "1,024 threads and processes; the limit is 1,024"),
        (sight(opened=5000), "descriptors", "5,000 open files; the limit is 4,096"),
    ],
)
def test_which_limit_was_passed(seen: Sight, limit: str, words: str) -> None:
    over = judged(seen, LIMITS)
    assert over is not None
    assert over.details["limit"] == limit
    assert words in str(over)


def test_who_keeps_to_the_limits_hears_nothing() -> None:
    assert (
        judged(sight(memory=100 * MIB, files=10 * MIB, count=65_536, threads=1023), LIMITS) is None
    )


def test_private_memory_is_seen() -> None:
    before = held(OWN)
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        for start in range(0, len(kept), MIB):
            kept[start : start + MIB] = b"x" * MIB
        assert held(OWN).private - before.private >= 60 * MIB


def test_shared_memory_is_seen_even_where_nothing_of_it_is_mapped_in() -> None:
    before = sum(shared(OWN).values())
    with mmap.mmap(-1, 64 * MIB) as kept:
        kept[:] = b"x" * len(kept)
        kept.madvise(mmap.MADV_DONTNEED)
        assert sum(shared(OWN).values()) - before == 64 * MIB


def test_a_process_that_lives_is_looked_at_itself() -> None:
    assert living(OWN) == OWN
