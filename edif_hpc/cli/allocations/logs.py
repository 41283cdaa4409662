"""Following the log of an allocation.

Where its folder cannot be seen from here (another cluster, another machine), the relay has the last words of allocations that
have ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from edif_hpc.cli.watch import watch


def follow(log: Path, since: int) -> Iterator[str]:
    """What is added to a log after it was read so far, for ever."""
    with log.open("rb") as file:
        file.seek(since)
        for added in watch(file.read):
            if added:
                yield added.decode(errors="replace")
