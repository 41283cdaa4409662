"""A worker whose engine runs no model: `python -m edif_hpc.testing.noop_worker ORDER PILOT_PID NONCE`.

Everything but the engine is the real worker: process, socket, keys, leases, transfers, failpoints. It warms in a fraction
of a second, so it serves where the engine is not the point: crash tests of the queue, and benches of its throughput.

What a request does is told by its blob, a JSON object (`Task`); anything else is run as an empty one. The result is a
function of the blob alone (`result_of`), so whoever sent it knows the one right answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Final

import msgspec

from edif_hpc.slurm.order import WorkerOrder
from edif_hpc.worker.app import MakeEngine
from edif_hpc.worker.app import main as worker_main
from edif_hpc.worker.engine.values import (
    INLINE_BYTES,
    EngineInfo,
    Failed,
    FailureKind,
    Isolation,
    Job,
    Level,
    Outcome,
    Progress,
    Saved,
)

RUNS: Final = MappingProxyType(
    {"user": FailureKind.USER, "crash": FailureKind.CRASH, "oom": FailureKind.OOM}
)
_PIECES: Final = 16


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a request does; all fields may be left out."""

    name: str = ""  #: makes the blob, and so the result, different from others
    seconds: float = 0.0  #: how long it runs
    result_bytes: int = 64
    grows: bool = False  #: a large result is written, and goes up, while it runs
    log: str = ""  #: a line that it prints
    fails: str = ""  #: user, crash or oom: how it fails; worker: it kills the whole worker
    padding: str = ""  #: makes the blob large

    def blob(self) -> bytes:
        """As a client sends it."""
        return msgspec.json.encode(self)


def result_of(blob: bytes) -> bytes:
    """The one right result of a blob."""
    return hashlib.shake_256(blob).digest(_task(blob).result_bytes)


def _task(blob: bytes) -> Task:
    try:
        return msgspec.json.decode(blob, type=Task)
    except msgspec.DecodeError:
        return Task()


class NoopEngine:
    """Holds the port of an engine (`worker.runtime.Engine`)."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Be ready at once."""
        on_progress(Progress(stage="nothing to load"))
        return EngineInfo(
            commit=None,
            dtype="none",
            tasks={},
            persistent=(),
            attn_implementation=None,
            python_version=sys.version,
            packages={},
            weights_bytes=0,
            load_s=0.0,
            isolation=Isolation(level=Level.FULL, steps=(), missing=()),
        )

    async def run(
        self, job: Job, on_log: Callable[[str], None], on_written: Callable[[Path, int], None]
    ) -> Outcome:
        """Do what the blob says."""
        blob = (
            job.blob
            if isinstance(job.blob, bytes)
            else await asyncio.to_thread(job.blob.read_bytes)
        )
        task = _task(blob)
        if task.log:
            on_log(task.log)
        file = self._scratch / f"result-{job.request_id}-{job.attempt}"
        seconds = min(task.seconds, job.limits.wall_s)
        if task.grows:
            await _write_slowly(file, result_of(blob), seconds, on_written)
        elif seconds:
            await asyncio.sleep(seconds)
        if task.fails == "worker":
            os.kill(os.getpid(), signal.SIGKILL)
        if task.fails:
            return Failed(
                kind=RUNS[task.fails],
                message=f"this task fails as {task.fails}",
                meta={"killed": True},
            )
        result = result_of(blob)
        if len(result) <= INLINE_BYTES:
            return Saved(
                inline=result, file=None, size=len(result), meta={"runtime": task.seconds}
            )
        if not task.grows:
            await asyncio.to_thread(file.write_bytes, result)
        on_written(file, len(result))
        return Saved(inline=None, file=file, size=len(result), meta={"runtime": task.seconds})

    async def stop(self) -> None:
        """Nothing to end."""


async def _write_slowly(
    file: Path, result: bytes, seconds: float, on_written: Callable[[Path, int], None]
) -> None:
    """Write a result piece by piece, and say how much of it is final each time."""
    step = -(-len(result) // _PIECES)
    with file.open("wb", buffering=0) as out:
        for start in range(0, len(result), step):
            await asyncio.sleep(seconds / _PIECES)
            out.write(result[start : start + step])
            on_written(file, min(start + step, len(result)))


def _noop(order: WorkerOrder) -> MakeEngine:
    return lambda _: NoopEngine(Path(order.scratch))


if __name__ == "__main__":
    os.umask(0o077)
    raise SystemExit(worker_main(sys.argv, _noop))
