"""The engine as the worker sees it: start it, run jobs, stop it.

Executors are forked ahead of need, so that a job finds one ready: locked up, warm, waiting. Each is used
once. Its replacement is ordered when the job has ended, if another one is ready, so that forking does
not compete with the job; and at once if none is.

A job ends in one of these ways: the executor says so; it dies (then the evidence decides between a crash
and memory that ran out); its time is over; or the caller cancels the task, and then `run` returns only
when the process is reaped. When the zygote dies, all executors die with it, every job ends with the kind
`engine`, and `Engine.died` is set: the worker starts a new engine.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edif_hpc.errors import EngineError, IsolationTooWeak, RemoteProtocolError
from edif_hpc.worker.engine import evidence
from edif_hpc.worker.engine.messages import (
    FROM_ZYGOTE,
    Exited,
    Fork,
    Forked,
    Load,
    Loaded,
    Loading,
    Refused,
)
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, AsyncChannel, PeerClosed
from edif_hpc.worker.engine.seat import Seat
from edif_hpc.worker.engine.values import (
    EngineInfo,
    EngineSpec,
    Failed,
    FailureKind,
    Isolation,
    Job,
    Level,
    Limits,
    Outcome,
    Progress,
)

#: How long a killed process may take to be reaped before the engine counts as broken.
REAP_TIMEOUT_S = 10.0
STDERR_LINES = 40
#: So many executors in a row that do not become ready end the engine.
FAILED_STARTS = 3

Quiet: Callable[..., None] = lambda *_: None  # noqa: E731


class Engine:
    """One loaded model and the executors that run requests on it."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        #: Why the engine is dead, once it is.
        self.died: asyncio.Future[str]
        self._numbers = itertools.count(1)
        self._seats: dict[int, Seat] = {}
        self._ready: asyncio.Queue[Seat] = asyncio.Queue()
        self._warming = 0
        self._failed_starts = 0
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._control: AsyncChannel
        self._process: Process
        self._stopping = False

    # -- life ----------------------------------------------------------------

    async def start(self, on_progress: Callable[[Progress], None] = Quiet) -> EngineInfo:
        """Load the model, fill the pool, run the self-test.

        Raises:
            IsolationTooWeak: the floor cannot be reached on this machine.
            EngineError: anything else went wrong; the message says what was seen.
        """
        self.died = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(self.spec.load_timeout_s):
                await self._launch()
                loaded = await self._loaded(on_progress)
                self._spawn(self._listen(), "engine-control")
                self._refill()
                on_progress(Progress(stage="self-test"))
                await self._self_test(loaded.selftest)
        except TimeoutError as error:
            await self.stop()
            raise EngineError(f"the engine is not up after {self.spec.load_timeout_s} s") from error
        except BaseException:
            await self.stop()
            raise
        return _info(loaded)

    async def stop(self) -> None:
        """End every process and wait until they are gone."""
        self._stopping = True
        for seat in self._seats.values():
            seat.kill()
        if hasattr(self, "_process"):
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
            self._control.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for seat in list(self._seats.values()):
            self._seats.pop(seat.number).clear()

    async def run(
        self,
        job: Job,
        on_log: Callable[[str], None] = Quiet,
        on_written: Callable[[Path, int], None] = Quiet,
    ) -> Outcome:
        """Run one job in an executor of its own and return how it ended.

        `on_log` gets what it prints. `on_written` gets the result's file and how many of its bytes are
        final, while it grows. Cancelling the calling task kills the executor; `CancelledError` is raised
        when it is reaped.
        """
        seat = await self._take()
        if seat is None:
            return self._engine_failure()
        try:
            async with asyncio.timeout(job.limits.wall_s):
                return await seat.run(job, on_log, on_written)
        except TimeoutError:
            text = f"the request was stopped after {job.limits.wall_s:g} s, its limit of wall time"
            return await self._failed(seat, FailureKind.TIMEOUT, text)
        except RemoteProtocolError as error:
            text = f"the executor was stopped because it broke its protocol: {error}"
            return await self._failed(seat, FailureKind.CRASH, text)
        except PeerClosed:
            return await self._post_mortem(seat, job.limits)
        except asyncio.CancelledError:
            seat.kill()
            await asyncio.shield(self._reaped(seat))
            raise
        finally:
            seat.kill()
            self._refill()

    # -- executors -----------------------------------------------------------

    async def _take(self) -> Seat | None:
        """Return a ready executor, or `None` if there will be none."""
        while not self.died.done():
            if self._ready.empty():
                self._refill()
            getting = asyncio.ensure_future(self._ready.get())
            try:
                await asyncio.wait({getting, self.died}, return_when=asyncio.FIRST_COMPLETED)
            except asyncio.CancelledError:
                if not getting.cancel():
                    self._ready.put_nowait(getting.result())
                raise
            if not getting.done():
                getting.cancel()
                return None
            seat = getting.result()
            if not seat.exited.done():
                return seat
        return None

    def _refill(self) -> None:
        """Order as many executors as are missing."""
        if self.died.done() or self._stopping:
            return
        for _ in range(self.spec.ready - self._ready.qsize() - self._warming):
            self._warming += 1
            self._spawn(self._hire(), "engine-executor")

    async def _hire(self) -> None:
        """Have an executor forked, see it ready, and later see it reaped."""
        seat = Seat(next(self._numbers), self.spec.scratch)
        self._seats[seat.number] = seat
        ready = False
        try:
            async with asyncio.timeout(self.spec.ready_timeout_s):
                await self._control.send(
                    Fork(executor=seat.number), [seat.theirs.fileno(), seat.result_fd]
                )
                seat.handed_over()
                await seat.ready()
                ready = True
        except (PeerClosed, RemoteProtocolError, TimeoutError) as error:
            seat.kill()
            self._failed_start(error)
        finally:
            self._warming -= 1
        if ready:
            self._failed_starts = 0
            self._ready.put_nowait(seat)
        await asyncio.shield(seat.exited)
        self._seats.pop(seat.number).clear()

    def _failed_start(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            self._die(f"{FAILED_STARTS} executors in a row did not become ready: {error}")
        else:
            self._refill()

    async def _reaped(self, seat: Seat) -> Exited | None:
        """Wait until the executor is gone; `None` if the zygote is, and took it along."""
        await asyncio.wait(
            {seat.exited, self.died},
            timeout=REAP_TIMEOUT_S,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if seat.exited.done():
            return seat.exited.result()
        if not self.died.done():
            self._die(f"executor {seat.number} is not gone {REAP_TIMEOUT_S:g} s after SIGKILL")
        return None

    async def _failed(self, seat: Seat, kind: FailureKind, text: str) -> Failed:
        seat.kill()
        await self._reaped(seat)
        return Failed(kind=kind, message=text, meta={})

    async def _post_mortem(self, seat: Seat, limits: Limits) -> Failed:
        """Say why an executor died that nobody killed."""
        seat.channel.close()
        exited = await self._reaped(seat)
        if exited is None:
            return self._engine_failure()
        kind, text = evidence.judge(exited, limits, evidence.oom_kills() > self._oom_kills)
        self._oom_kills = evidence.oom_kills()
        return Failed(kind=kind, message=text, meta={"peak_rss_bytes": exited.peak_rss_bytes})

    # -- zygote --------------------------------------------------------------

    async def _launch(self) -> None:
        _empty(self.spec.scratch)
        self._oom_kills = evidence.oom_kills()
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "edif_hpc.worker.engine.zygote",
                str(theirs.fileno()),
                str(os.getpid()),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=_environment(self.spec),
                cwd=self.spec.scratch,
                pass_fds=[theirs.fileno()],
            )
        self._control = AsyncChannel(
            ours, accepts=FROM_ZYGOTE, receive_limit=FROM_ZYGOTE_BYTES, max_fds=1
        )
        self._spawn(self._keep_stderr(), "engine-stderr")
        spec = self.spec
        await self._control.send(
            Load(
                model_key=spec.model_key,
                source=spec.source,
                revision=spec.revision,
                dtype=spec.dtype,
                device=spec.device,
                threads=spec.threads,
                scratch=str(spec.scratch),
                ceiling=str(spec.ceiling),
                floor=str(spec.floor),
            )
        )

    async def _loaded(self, on_progress: Callable[[Progress], None]) -> Loaded:
        while True:
            try:
                message, _ = await self._control.receive()
            except PeerClosed as error:
                raise EngineError(await self._zygote_ended()) from error
            match message:
                case Loading(stage=stage, done=done, total=total):
                    on_progress(Progress(stage=stage, done=done, total=total))
                case Loaded():
                    return message
                case Refused(code=code, message=text):
                    weak = code == IsolationTooWeak.code
                    raise (IsolationTooWeak if weak else EngineError)(text)
                case _:
                    raise EngineError(f"the zygote says {type(message).__name__} while loading")

    async def _listen(self) -> None:
        """Follow what the zygote says about executors, until it is gone."""
        try:
            while True:
                message, fds = await self._control.receive()
                match message:
                    case Forked(executor=number):
                        self._seats[number].forked(fds[0])
                    case Exited(executor=number):
                        self._seats[number].exited.set_result(message)
                    case Refused(message=text):
                        self._die(text)
                    case _:
                        raise RemoteProtocolError(f"{type(message).__name__} while serving")
        except PeerClosed:
            self._die(await self._zygote_ended())
        except (RemoteProtocolError, KeyError) as error:
            self._die(f"the zygote broke its protocol: {error}")

    async def _zygote_ended(self) -> str:
        status = await self._process.wait()
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the zygote ended by {cause}; its last lines: {' | '.join(self._stderr) or 'none'}"

    def _die(self, reason: str) -> None:
        """Declare the engine dead: nothing more will come of it."""
        if self.died.done():
            return
        self.died.set_result(reason)
        if self._process.returncode is None:
            self._process.kill()
        for seat in self._seats.values():
            seat.kill()

    def _engine_failure(self) -> Failed:
        text = "the server lost the process that held the model; nothing is wrong with the request"
        return Failed(kind=FailureKind.ENGINE, message=text, meta={"cause": self.died.result()})

    async def _keep_stderr(self) -> None:
        stream = self._process.stderr
        if stream is None:
            return
        while data := await stream.read(4096):
            self._stderr.extend(data.decode(errors="replace").splitlines())

    async def _self_test(self, blob: bytes) -> None:
        outcome = await self.run(Job(request_id="self-test", attempt=0, blob=blob, compress=True))
        if isinstance(outcome, Failed):
            raise EngineError(
                f"the self-test failed ({outcome.kind}): {outcome.message} {outcome.meta}"
            )

    def _spawn(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """A task of ours that breaks takes the engine with it, visibly."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._die(f"{task.get_name()} broke: {error!r}")


def _environment(spec: EngineSpec) -> dict[str, str]:
    """Return the whole environment of the zygote; nothing of the worker's is inherited."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(spec.scratch),
        "TMPDIR": str(spec.scratch),
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # One thread before the fork, in every library that would make a pool.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    optional = {
        "HF_ENDPOINT": spec.hub_endpoint,
        "HF_HUB_CACHE": spec.hub_cache and str(spec.hub_cache),
        "HF_TOKEN": spec.hub_token,
    }
    return environment | {name: value for name, value in optional.items() if value}


def _empty(folder: Path) -> None:
    """Make the folder, and remove what an engine before left in it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _info(loaded: Loaded) -> EngineInfo:
    """Turn what the zygote says into values.

    Raises:
        EngineError: a field is missing.
    """
    fields: dict[str, Any] = dict(loaded.info)
    try:
        walls = fields.pop("isolation")
        isolation = Isolation(
            level=Level(walls["level"]),
            steps=tuple(walls["steps"]),
            missing=tuple(walls["missing"]),
        )
        persistent = tuple(fields.pop("persistent"))
        return EngineInfo(**fields, persistent=persistent, isolation=isolation)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the zygote describes the model incompletely: {error!r}") from error
