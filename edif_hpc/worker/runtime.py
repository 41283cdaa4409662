"""The worker's loop: carries out what `wire.session.WorkerSession` decides.

It owns the socket, the keys and the transfers; the engine runs researchers' code in other processes. A granted request
waits for a seat (`executors` of them), its blob is fetched if it is large, an executor runs it, its result goes up if it
is large, and its `Done` is repeated until the relay has answered. Results stay on scratch until then, so a relay that is
away for a while costs nothing but time.

The worker ends by itself in four ways, each with its exit code for the pilot: drained, refused by the relay, the engine
did not start, the engine died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.request import FailureKind
from edif_hpc.errors import EngineError, Unavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.wire import actions as a
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.session import Link, WorkerSession
from edif_hpc.wire.sockets import LinkEvent
from edif_hpc.worker.engine.values import EngineInfo, Failed, Job, Limits, Outcome, Progress, Saved
from edif_hpc.worker.transfer import BlobDamaged, PartUrls, Transfer

_log = logging.getLogger(__name__)

TICK_S = 0.25
_RETRY_S = 1.0
_LOG_TEXT = 60 << 10


class Exit(IntEnum):
    """Why a worker ended, for its pilot."""

    DRAINED = 0
    REFUSED = 3  #: the relay does not serve this peer; starting again does not help
    ENGINE_FAILED = 4  #: the model could not be loaded, or the isolation is too weak
    ENGINE_DIED = 5  #: the zygote died; start again


class Wire(Protocol):
    """The socket, as the runtime uses it (`wire.sockets.Dealer`)."""

    def send(self, frame: bytes) -> bool:
        """Queue a frame."""

    def reconnect(self) -> None:
        """Drop the connection and dial again."""

    async def close(self) -> None:
        """Flush and close."""


class Engine(Protocol):
    """What runs requests (`worker.engine.pool.Engine`)."""

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Load the model and pass the self-test."""

    async def run(self, job: Job, on_log: Callable[[str], None]) -> Outcome:
        """Run one job; cancelling the call kills its executor before it returns."""

    async def stop(self) -> None:
        """End all its processes."""

    @property
    def died(self) -> asyncio.Future[str]:
        """Resolved with the reason when it cannot run jobs any more."""


@dataclass(kw_only=True, eq=False)
class _Running:
    attempt: int
    task: asyncio.Task[None]
    report: bool = False


@dataclass(kw_only=True)
class WorkerRuntime:
    """One worker. `make_engine` builds the engine from what the relay says to serve."""

    make_engine: Callable[[Mapping[str, Any]], Engine]
    transfer: Transfer
    scratch: Path
    clock: Clock
    failpoints: Failpoints
    nonce: str
    _session: WorkerSession = field(init=False)
    _wire: Wire | None = None
    _engine: Engine | None = None
    _running: dict[str, _Running] = field(default_factory=dict)
    _seats: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _urls: dict[tuple[str, int], asyncio.Future[PartUrls]] = field(default_factory=dict)
    _part_bytes: int = 8 << 20
    _files: dict[tuple[str, int], Path] = field(default_factory=dict)
    _deployment: asyncio.Future[Mapping[str, Any]] = field(init=False)
    _exit: asyncio.Future[Exit] = field(init=False)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._deployment = loop.create_future()
        self._exit = loop.create_future()
        self._session = WorkerSession(nonce=self.nonce, window=0, executors=1)

    async def run(self, wire: Wire) -> Exit:
        """Serve until drained, refused or broken."""
        self._wire = wire
        self._do(self._session.connected(self.clock.monotonic()))
        async with asyncio.TaskGroup() as group:
            ticking = group.create_task(self._tick(), name="tick")
            serving = group.create_task(self._serve(), name="serve")
            code = await self._exit
            serving.cancel()
            ticking.cancel()
        for running in list(self._running.values()):
            running.task.cancel()
        await asyncio.gather(
            *(each.task for each in self._running.values()), return_exceptions=True
        )
        if self._engine is not None:
            await self._engine.stop()
        await self.transfer.close()
        await wire.close()
        return code

    def drain(self, reason: str) -> None:
        """Signals and deadlines end here."""
        self._do(self._session.drain(reason))
        if self._session.link is Link.GREETING and not self._session.held:
            self._end(Exit.DRAINED)

    def received(self, frames: list[bytes]) -> None:
        """Frames of the relay."""
        now = self.clock.monotonic()
        for frame in frames:
            self._do(self._session.received(codec.decode_from_relay(frame), now))

    def saw(self, event: LinkEvent, endpoint: str) -> None:
        """The socket monitor's words."""
        if event is LinkEvent.REFUSED:
            _log.error(
                "the relay refuses this worker's key: its allocation has ended, or it never joined",
                extra={"event": "refused", "endpoint": endpoint},
            )
            self._end(Exit.REFUSED)
        elif event is LinkEvent.MISMATCH:
            _log.error(
                "what answers is not our relay (wrong server key, or not ZeroMQ)",
                extra={"event": "mismatch", "endpoint": endpoint},
            )

    # -- the model -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        deployment = await self._deployment
        engine = self._engine = self.make_engine(deployment)
        try:
            info = await engine.start(self._progress)
        except EngineError as error:
            _log.error("the engine did not start: %s", error, extra={"event": "engine_failed"})
            self._do(self._session.changed("failed", detail=str(error)))
            self._end(Exit.ENGINE_FAILED)
            return
        executors = int(deployment.get("executors", 1))
        self._seats = asyncio.Semaphore(executors)
        if not self._draining:
            self._session.window, self._session.executors = executors + 1, executors
        self._do(self._session.changed("warm", detail="serves", facts=_facts(info)))
        reason = await engine.died
        _log.error("the engine died: %s", reason, extra={"event": "engine_died"})
        self._end(Exit.ENGINE_DIED)

    def _progress(self, progress: Progress) -> None:
        share = progress.done / progress.total if progress.total else None
        self._do(self._session.changed("loading", detail=progress.stage, progress=share))

    # -- one request ---------------------------------------------------------------------------------------------------

    async def _execute(self, grant: m.Grant) -> None:
        async with self._seats:
            engine = self._engine
            if engine is None or not self._session.holds(grant.request, grant.attempt):
                return
            blob_file = None
            try:
                if grant.blob is None:
                    blob_file = self.scratch / f"blob-{grant.request}-{grant.attempt}"
                    await self._fetch(grant, blob_file)
                self.failpoints.hit("worker.run.before")
                self._do(self._session.began(grant.request, grant.attempt))
                outcome = await engine.run(
                    _job(grant, blob_file), lambda text: self._log(grant, text)
                )
                self.failpoints.hit("worker.run.after")
            except BlobDamaged as error:
                outcome = Failed(
                    kind=FailureKind.DAMAGED, message=f"{error}; send it again", meta={}
                )
            finally:
                if blob_file is not None:
                    blob_file.unlink(missing_ok=True)
        await self._answer(grant, outcome)

    async def _fetch(self, grant: m.Grant, target: Path) -> None:
        while True:
            try:
                await self.transfer.fetch(
                    grant.blob_url, target, size_bytes=grant.blob_bytes, sha256=grant.blob_sha256
                )
            except Unavailable as error:
                _log.warning(
                    "a blob is not to be had yet",
                    extra={"event": "blob_retry", "request": grant.request, "reason": str(error)},
                )
                await asyncio.sleep(
                    _RETRY_S
                )  # the relay is away; the lease says how long this makes sense
            else:
                return

    async def _answer(self, grant: m.Grant, outcome: Outcome) -> None:
        end = _lease_end(outcome)
        if isinstance(outcome, Failed) and end is not None:
            self._do(
                self._session.returned(
                    grant.request, grant.attempt, end, {"cause": outcome.message[:200]}
                )
            )
            return
        if isinstance(outcome, Saved) and outcome.file is not None:
            self._files[grant.request, grant.attempt] = outcome.file
            done = m.Done(
                request=grant.request, attempt=grant.attempt, size=outcome.size, meta=outcome.meta
            )
            await self._upload(done, outcome.file)
            return
        self._finish(_done(grant, outcome))

    async def _upload(self, done: m.Done, source: Path) -> None:
        async def ask(first: int, count: int) -> PartUrls:
            return await self._ask(done.request, done.attempt, first, count)

        while self._session.holds(done.request, done.attempt):
            try:
                parts = await self.transfer.upload(source, done.size, self._part_bytes, ask)
            except Unavailable as error:
                _log.warning(
                    "a result is not up yet",
                    extra={"event": "upload_retry", "request": done.request, "reason": str(error)},
                )
                await asyncio.sleep(_RETRY_S)
                continue
            self._finish(
                m.Done(
                    request=done.request,
                    attempt=done.attempt,
                    size=done.size,
                    parts=parts,
                    meta=done.meta,
                )
            )
            return

    async def _ask(self, request: str, attempt: int, first: int, count: int) -> PartUrls:
        key = (request, first)
        need = m.Need(request=request, attempt=attempt, first=first, count=count)
        while True:
            future = self._urls.setdefault(key, asyncio.get_running_loop().create_future())
            self._send(need)
            try:
                return await asyncio.wait_for(
                    asyncio.shield(future), 2 * self._session.heartbeat_s
                )
            except TimeoutError:
                continue  # the question or its answer was lost
            finally:
                if future.done():
                    self._urls.pop(key, None)

    def _finish(self, done: m.Done) -> None:
        self.failpoints.hit("worker.send.done.before")
        self._do(self._session.finished(done, self.clock.monotonic()))
        self.failpoints.hit("worker.send.done.after")

    def _log(self, grant: m.Grant, text: str) -> None:
        if self._session.link is not Link.GREETING:
            for start in range(0, len(text), _LOG_TEXT // 4):
                self._send(
                    m.Log(
                        request=grant.request,
                        attempt=grant.attempt,
                        text=text[start : start + _LOG_TEXT // 4],
                    )
                )

    # -- actions -------------------------------------------------------------------------------------------------------

    def _do(self, actions: list[a.Action]) -> None:
        for action in actions:
            match action:
                case a.Send():
                    self._send(action.message)
                case a.Run():
                    self._spawn(
                        action.grant.request, action.grant.attempt, self._execute(action.grant)
                    )
                case a.Kill():
                    self._kill(action)
                case a.Urls():
                    self._arrived(action.parts)
                case a.UploadAgain():
                    source = self._files[action.done.request, action.done.attempt]
                    self._spawn(
                        action.done.request, action.done.attempt, self._upload(action.done, source)
                    )
                case a.Settled():
                    self._settled(action.request, action.attempt)
                case a.Welcomed():
                    self._welcomed(action.welcome)
                case a.Draining():
                    _log.info("draining", extra={"event": "draining", "reason": action.reason})
                case a.Reconnect():
                    self._reconnect(action.silent_s)
                case a.Leave():
                    self._end(Exit.DRAINED)
                case a.Fatal():
                    _log.error(
                        "refused by the relay: %s",
                        action.detail,
                        extra={"event": "refused", "code": action.code},
                    )
                    self._end(Exit.REFUSED)

    def _spawn(self, request: str, attempt: int, work: Any) -> None:
        running = _Running(
            attempt=attempt, task=asyncio.create_task(work, name=f"run-{request[:8]}")
        )
        self._running[request] = running
        running.task.add_done_callback(lambda task: self._ended(request, running, task))

    def _ended(self, request: str, running: _Running, task: asyncio.Task[None]) -> None:
        if self._running.get(request) is running:
            del self._running[request]
        if running.report:
            self._do(self._session.killed(request, running.attempt))
        elif not task.cancelled() and task.exception() is not None:
            error = task.exception()
            _log.error(
                "a request could not be run",
                exc_info=error,
                extra={"event": "run_failed", "request": request},
            )
            self._do(
                self._session.returned(
                    request, running.attempt, LeaseEnd.UNKNOWN, {"cause": repr(error)[:200]}
                )
            )

    def _kill(self, action: a.Kill) -> None:
        running = self._running.get(action.request)
        if running is not None and running.attempt == action.attempt:
            running.report = action.report
            running.task.cancel()
        elif action.report:
            self._do(self._session.killed(action.request, action.attempt))

    def _arrived(self, parts: m.Parts) -> None:
        future = self._urls.get((parts.request, parts.first))
        if future is not None and not future.done():
            future.set_result(PartUrls(first=parts.first, urls=list(parts.urls)))

    def _settled(self, request: str, attempt: int) -> None:
        source = self._files.pop((request, attempt), None)
        if source is not None:
            source.unlink(missing_ok=True)

    def _welcomed(self, welcome: m.Welcome) -> None:
        self._part_bytes = welcome.part_bytes
        if not self._deployment.done() and welcome.deployment:
            self._deployment.set_result(welcome.deployment)

    def _reconnect(self, silent_s: float) -> None:
        _log.warning(
            "the relay is silent; dialling again",
            extra={"event": "reconnect", "silent_s": round(silent_s, 1)},
        )
        if self._wire is not None:
            self._wire.reconnect()
        self._do(self._session.connected(self.clock.monotonic()))

    def _send(self, message: m.Message) -> None:
        if self._wire is not None and not self._wire.send(codec.encode(message)):
            _log.warning(
                "a message was not queued",
                extra={"event": "send_full", "kind": type(message).__name__},
            )

    @property
    def _draining(self) -> bool:
        return self._session.link in (Link.DRAINING, Link.LEFT)

    def _end(self, code: Exit) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._do(self._session.tick(self.clock.monotonic()))


# -- values ------------------------------------------------------------------------------------------------------------


def _job(grant: m.Grant, blob_file: Path | None) -> Job:
    known = {
        key: value for key, value in grant.limits.items() if key in Limits.__dataclass_fields__
    }
    limits = Limits(
        **{key: value if key == "wall_s" else int(value) for key, value in known.items()}
    )  # type: ignore[arg-type]
    return Job(
        request_id=grant.request,
        attempt=grant.attempt,
        blob=blob_file if grant.blob is None and blob_file is not None else grant.blob or b"",
        compress=grant.compress,
        env=grant.env,
        model_key=grant.model_key,
        limits=limits,
    )


def _done(grant: m.Grant, outcome: Outcome) -> m.Done:
    if isinstance(outcome, Failed):
        message = outcome.message[-60_000:]
        return m.Done(
            request=grant.request,
            attempt=grant.attempt,
            error=str(outcome.kind),
            message=message,
            meta=outcome.meta,
        )
    return m.Done(
        request=grant.request,
        attempt=grant.attempt,
        size=outcome.size,
        inline=outcome.inline or b"",
        meta=outcome.meta,
    )


def _lease_end(outcome: Outcome) -> LeaseEnd | None:
    """The end of the lease when an executor died without an answer: the relay decides whether it runs again."""
    if isinstance(outcome, Failed):
        if outcome.kind in (FailureKind.CRASH, FailureKind.ENGINE):
            return LeaseEnd.EXECUTOR_CRASH
        if outcome.kind == FailureKind.OOM and outcome.meta.get("killed"):
            return LeaseEnd.OOM
    return None


def _facts(info: EngineInfo) -> dict[str, object]:
    """What the relay, `/env`, `ps` and every result's `meta` are told of this worker."""
    versions = {
        name: info.packages[name]
        for name in ("nnsight", "torch", "transformers")
        if name in info.packages
    }
    return {
        "commit": info.commit,
        "dtype": info.dtype,
        "device": "cpu",
        "isolation": str(info.isolation.level),
        "isolation_missing": list(info.isolation.missing),
        "versions": versions | {"python": info.python_version.split()[0]},
        "python_version": info.python_version,
        "packages": dict(info.packages),
        "weights_bytes": info.weights_bytes,
        "load_s": round(info.load_s, 2),
        "attn_implementation": info.attn_implementation,
        "task": info.task,
    }
