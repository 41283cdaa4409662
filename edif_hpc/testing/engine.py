"""An engine whose runs end when and how a test says. It holds the port `worker.ports.Engine`.

engine = ScriptedEngine()
...                                    # a worker is granted request "r1"
engine.end("r1", saved(b"result"))     # or `failed(...)`, or leave it running
assert engine.killed == ["r2"]         # cancelled, say
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from edif_hpc.domain.request import FailureKind
from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.values import (
    EngineInfo,
    Failed,
    Isolation,
    Job,
    Level,
    Outcome,
    Progress,
    Saved,
)

INFO = EngineInfo(
    commit="c0ffee",
    dtype="float32",
    tasks={"text-generation": "Tiny"},
    persistent=(),
    attn_implementation="sdpa",
    python_version="3.11.9 (main)",
    packages={"torch": "2.13.0", "nnsight": "0.8.1"},
    isolation=Isolation(level=Level.FULL, steps=(), missing=()),
    weights_bytes=1,
    load_s=0.1,
)


def saved(inline: bytes) -> Saved:
    """A result that travels in the message."""
    return Saved(inline=inline, file=None, size=len(inline), meta={})


def saved_file(file: Path) -> Saved:
    """A result that goes up in parts."""
    return Saved(inline=None, file=file, size=file.stat().st_size, meta={})


def failed(kind: FailureKind, message: str = "it failed") -> Failed:
    """No result; one that was killed says so, as the real engine does."""
    meta = {"killed": True} if kind is FailureKind.OOM else {}
    return Failed(kind=kind, message=message, meta=dict(meta))


class ScriptedEngine:
    """Runs what it is given until told otherwise; `auto` answers at once."""

    def __init__(
        self,
        *,
        auto: Callable[[Job], Outcome] | None = None,
        refusal: EngineError | None = None,
        loading: bool = False,
    ) -> None:
        self.died: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.loaded = asyncio.Event()
        self.reaped = asyncio.Event()  #: while it is not set, a killed executor is not gone
        self.reaped.set()
        if not loading:
            self.loaded.set()
        self.jobs: list[Job] = []
        self.blobs: list[bytes] = []
        self.killed: list[str] = []
        self.stopped = False
        self._auto, self._refusal = auto, refusal
        self._ends: dict[str, asyncio.Future[Outcome]] = {}
        self._logs: dict[str, Callable[[str], None]] = {}

    @property
    def running(self) -> list[str]:
        """The requests that run now."""
        return list(self._ends)

    def end(self, request_id: str, outcome: Outcome) -> None:
        """Let a run end."""
        self._ends[request_id].set_result(outcome)

    def say(self, request_id: str, text: str) -> None:
        """Let a run print."""
        self._logs[request_id](text)

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Load until `loaded`; raise the refusal, if there is one."""
        on_progress(Progress(stage="weights", done=1, total=2))
        await self.loaded.wait()
        if self._refusal is not None:
            raise self._refusal
        return INFO

    async def run(
        self,
        job: Job,
        on_log: Callable[[str], None],
        on_written: Callable[[Path, int], None],  # noqa: ARG002 - it writes nothing by itself
    ) -> Outcome:
        """Run until `end`, or until killed."""
        self.jobs.append(job)
        blob = job.blob
        self.blobs.append(blob if isinstance(blob, bytes) else await _read(blob))
        if self._auto is not None:
            return self._auto(job)
        end: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._ends[job.request_id] = end
        self._logs[job.request_id] = on_log
        try:
            return await end
        except asyncio.CancelledError:
            self.killed.append(job.request_id)
            await self.reaped.wait()
            raise
        finally:
            del self._ends[job.request_id]

    async def stop(self) -> None:
        """Nothing is left."""
        self.stopped = True
        await self.reaped.wait()


async def _read(path: Path) -> bytes:
    return await asyncio.to_thread(path.read_bytes)
