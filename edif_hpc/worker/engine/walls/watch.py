"""The worker's eye on what a running executor uses, for what no limit of the kernel's covers.

RLIMIT_DATA bounds the private memory of one process, at once. It knows nothing of memory that is shared, of file systems in
memory, and of child processes, each of which has a limit of its own. A control group would count all of it; but no scheduler that
we know hands one to its jobs, so there is mostly none that we could make. So the worker looks, a few times a second, and ends
an executor that has more than its request may.

What is counted as memory is what came after the executor was ready, over all processes of its PID namespace:

* private pages, also those in swap, and page tables (a large empty mapping is not free);
* shared mappings that no file outside its own is behind, each once and with its whole size: what is in them and mapped
  nowhere at the moment can be seen by nobody;
* the files in its folder, where that is a file system in memory.

Private pages are first summed up as each process counts them, which takes microseconds. Processes that were forked count
what they have in common several times; so only if that sum is too high is each asked for its proportional share, which the
kernel has to walk all of its pages for.

Where the folder lies on a disk, its files are added up, also those that were deleted and are still open. A process
that cannot be looked at while it lives is ended: somebody made it so.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from edif_hpc.domain.limits import Limits, overrun, size
from edif_hpc.errors import OverLimit
from edif_hpc.worker.engine.protocol import PeerClosed
from edif_hpc.worker.engine.walls import folders
from edif_hpc.worker.engine.walls.jail import FILES, PROCESSES
from edif_hpc.worker.engine.walls.memory import Held, held, living, shared

if TYPE_CHECKING:
    from edif_hpc.worker.engine.seat import Seat

INTERVAL_S = 0.25
THREADS = 4
#: Looking takes at most one part in so many of the time.
SPARING = 20
#: Open files of all processes: what waits in sockets and pipes is the kernel's memory, up to 225 KiB for each, and nobody's by /proc.
DESCRIPTORS = 4096


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What an executor uses beyond what it had when it was ready."""

    memory_bytes: int
    scratch: folders.Contents
    threads: int
    descriptors: int


class Watch:
    """Watches the executors of one engine."""

    def __init__(self) -> None:
        # Of its own: what clears up after a request may take all the threads of the loop for a while.
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="watch")

    @asynccontextmanager
    async def over(self, seat: Seat, limits: Limits) -> AsyncIterator[None]:
        """Watch one while it runs a request.

        Raises:
            OverLimit: it used more than it may, and was ended.
        """
        watching = asyncio.create_task(self._follow(seat, limits), name="engine-watch")
        try:
            yield
        except PeerClosed:
            if watching.done() and not watching.cancelled():
                raise watching.result() from None
            raise
        finally:
            watching.cancel()

    async def _follow(self, seat: Seat, limits: Limits) -> OverLimit:
        """Look until there is too much; end the executor and return what there was."""
        loop = asyncio.get_running_loop()
        pause_s = INTERVAL_S
        while True:
            await asyncio.sleep(pause_s)
            began = perf_counter()
            try:
                over = await loop.run_in_executor(self._threads, look, seat, limits)
            except Exception:  # of ours: who cannot be watched does not run on
                seat.kill()
                raise
            if over is not None:
                seat.kill()
                return over
            pause_s = max(INTERVAL_S, SPARING * (perf_counter() - began))


def look(seat: Seat, limits: Limits) -> OverLimit | None:
    """Return what an executor has too much of, if it has."""
    pid = seat.pid
    own = living(Path(f"/proc/{pid}")) if pid is not None else None
    if own is None:
        return None
    try:
        over = judged(seen(seat, own, limits), limits)
    except OSError as error:
        over = OverLimit(
            f"the request was stopped because its process could not be watched any more: {error}",
            {"limit": "watch"},
        )
    # What was seen of a process that is gone may be another's.
    return over if seat.pid == pid and living(own) is not None else None


def judged(sight: Sight, limits: Limits) -> OverLimit | None:
    """Return which limit was passed, if one was."""
    files, memory = sight.scratch, sight.memory_bytes
    if files.bytes > limits.scratch_bytes:
        happened = f"the request has {size(files.bytes)} of temporary files"
        return overrun(limits, "scratch_bytes", happened, used=files.bytes)
    if memory > limits.memory_bytes:
        happened = f"the request took {size(memory)} of memory"
        return overrun(limits, "memory_bytes", happened, peak_bytes=memory)
    if files.complaint:
        return _too_many("files", f"it made {files.complaint}", files.count, FILES)
    for limit, used, most, happened in (
        ("files", files.count, FILES, "it has {:,} temporary files"),
        ("processes", sight.threads, PROCESSES, "it runs {:,} threads and processes"),
        ("descriptors", sight.descriptors, DESCRIPTORS, "its processes have {:,} open files"),
    ):
        # The kernel lets nobody have more processes: who has as many tries to, and keeps all cores busy with it.
        if used > most or (limit == "processes" and used == most):
            return _too_many(limit, happened.format(used), used, most)
    return None


def _too_many(limit: str, happened: str, used: int, value: int) -> OverLimit:
    text = f"the request was stopped: {happened}; the limit is {value:,} at a time"
    return OverLimit(text, {"limit": limit, "value": value, "used": used})


def seen(seat: Seat, own: Path, limits: Limits) -> Sight:
    """Look at an executor, which `own` is in /proc.

    Raises:
        OSError: nothing can be seen of it.
    """
    in_memory = "scratch" in seat.steps
    scratch = (
        folders.mounted(own / "root" / seat.folder.relative_to("/"))
        if in_memory
        else folders.contents(seat.folder, own / "fd")
    )
    processes = [*_processes(own / "root" / "proc")] if "proc" in seat.steps else [own]
    counted = [each for each in map(_held, processes) if each is not None]
    files = scratch.bytes if in_memory else 0
    memory = sum(each.private for each in counted) - seat.before.private + files
    mapped = sum(each.mapped for each in counted) - seat.before.mapped
    if max(memory, mapped) > limits.memory_bytes:
        memory = _walked(processes, seat.before) + files
    return Sight(
        memory_bytes=max(0, memory),
        scratch=scratch,
        threads=sum(each.threads for each in counted),
        descriptors=sum(map(_descriptors, processes)),
    )


def _processes(proc: Path) -> Iterator[Path]:
    """Yield the processes of a PID namespace, which are all that its own /proc has; those that come and go are left out."""
    for name in os.listdir(proc):  # noqa: PTH208 - names suffice
        if name.isdigit():
            with suppress(FileNotFoundError, ProcessLookupError):
                process = living(proc / name)
                if process is not None:
                    yield process


def _held(process: Path) -> Held | None:
    with suppress(FileNotFoundError, ProcessLookupError):
        return held(process)
    return None


def _descriptors(process: Path) -> int:
    """Return how many a process has open: all of its threads have the same, see `seccomp`."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return len(os.listdir(process / "fd"))  # noqa: PTH208 - names suffice
    return 0


def _walked(processes: list[Path], before: Held) -> int:
    """Return what processes take together, counting once what they share."""
    private = 0
    mapped: dict[str, int] = {}
    for each in processes:
        with suppress(FileNotFoundError, ProcessLookupError):
            private += held(each).private if len(processes) == 1 else _proportional(each)
            for what, most in shared(each).items():
                mapped[what] = max(most, mapped.get(what, 0))
    return private - before.private + max(0, sum(mapped.values()) - before.shared)


def _proportional(process: Path) -> int:
    """Return a process's share of its private pages; where it does not show them, all of them."""
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except PermissionError:
        return held(process).private
    wanted = ("Pss_Anon:", "SwapPss:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(wanted))
