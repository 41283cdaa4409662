"""The worker's loop: carries out what `wire.session.WorkerSession` decides.

It owns the socket, the keys and the transfers; the engine runs researchers' code in other processes. A granted request
has its blob fetched if it is large, waits for a seat (`executors` of them), an executor runs it, its result goes up if it
is large, and its `Done` is repeated until the relay has answered. Results stay on scratch until then, so a relay that is
away for a while costs nothing but time.

The worker ends by itself in five ways, each with its exit code for the pilot (`WorkerExit`): drained, refused by the
relay, the engine did not start, its isolation is too weak, the engine died.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edif_hpc.clock import Clock
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.request import FailureKind
from edif_hpc.errors import EngineError, IsolationTooWeak, RemoteProtocolError, Unavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.slurm.order import WorkerExit
from edif_hpc.wire import actions as a
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.session import Link, WorkerSession
from edif_hpc.wire.sockets import LinkEvent
from edif_hpc.worker.engine.values import Failed, Outcome, Progress, Saved
from edif_hpc.worker.ports import Engine, Wire
from edif_hpc.worker.results import Results
from edif_hpc.worker.transfer import BlobDamaged, LinkExpired, Transfer
from edif_hpc.worker.translation import done_of, facts_of, job_of, lease_end, spent_of
from edif_hpc.worker.uploading import StoreGivenUp, Uploading

_log = logging.getLogger(__name__)

TICK_S = 0.25
_RETRY_S = 1.0
_LOG_CHARS = 15 << 10


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
    _results: Results = field(init=False)
    requests: int = 0  #: that an executor has answered
    _wire: Wire | None = None
    _engine: Engine | None = None
    _running: dict[str, _Running] = field(default_factory=dict)
    _parted: bool = False
    _going_up: dict[tuple[str, int], tuple[Uploading, int]] = field(default_factory=dict)
    _seats: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _deployment: asyncio.Future[Mapping[str, Any]] = field(init=False)
    _exit: asyncio.Future[WorkerExit] = field(init=False)
    _on: Mapping[type[a.Action], Callable[[Any], None]] = field(init=False)

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        self._deployment = loop.create_future()
        self._exit = loop.create_future()
        self._session = WorkerSession(nonce=self.nonce, window=0, executors=1)
        self._results = Results(transfer=self.transfer, send=self._send, clock=self.clock)
        self._on = {
            a.Send: lambda do: self._send(do.message),
            a.Run: self._start,
            a.Kill: self._kill,
            a.Urls: lambda do: self._results.arrived(do.parts),
            a.UploadAgain: self._upload_again,
            a.Settled: lambda do: self._results.settled(do.request, do.attempt),
            a.Welcomed: lambda do: self._welcomed(do.welcome),
            a.Draining: lambda do: _log.info(
                "draining", extra={"event": "draining", "reason": do.reason}
            ),
            a.Reconnect: lambda do: self._reconnect(do.silent_s),
            a.Leave: lambda _: self._end(WorkerExit.DRAINED),
            a.Fatal: self._refused,
        }

    async def run(self, wire: Wire) -> WorkerExit:
        """Serve until drained, refused or broken."""
        self._wire = wire
        self._do(self._session.connected(self.clock.monotonic()))
        try:
            async with asyncio.TaskGroup() as group:
                ticking = group.create_task(self._tick(), name="tick")
                serving = group.create_task(self._serve(), name="serve")
                code = await self._exit
                serving.cancel()
                ticking.cancel()
        finally:
            await self._close(wire)
        return code

    def drain(self, reason: str) -> None:
        """Signals and deadlines end here."""
        self._do(self._session.drain(reason))

    def cut_short(self, reason: str, end: LeaseEnd) -> None:
        """What runs has had its time: give it back, and leave."""
        self._do(self._session.cut_short(reason, end))

    def received(self, frames: list[bytes]) -> None:
        """Frames of the relay."""
        now = self.clock.monotonic()
        for frame in frames:
            try:
                message = codec.decode_from_relay(frame)
            except RemoteProtocolError as error:
                _log.error(
                    "the relay says what this worker does not understand: %s",
                    error,
                    extra={"event": "relay_fault"},
                )
            else:
                self._do(self._session.received(message, now))

    def saw(self, event: LinkEvent, endpoint: str) -> None:
        """The socket monitor's words."""
        if event is LinkEvent.REFUSED:
            _log.error(
                "the relay refuses this worker's key: its allocation has ended, or it never joined",
                extra={"event": "refused", "endpoint": endpoint},
            )
            self._end(WorkerExit.REFUSED)
        elif event is LinkEvent.MISMATCH:
            _log.error(
                "what answers is not our relay: wrong server key, not ZeroMQ, or a proxy between that reaches nobody",
                extra={"event": "mismatch", "endpoint": endpoint},
            )
        elif event is LinkEvent.DISCONNECTED:
            self._parted = True
        elif self._parted and self._session.link is not Link.LEFT:  # and now connected again
            self._parted = False
            self._do(self._session.connected(self.clock.monotonic()))

    # -- the model -----------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        deployment = await self._deployment
        engine = self._engine = self.make_engine(deployment)
        try:
            info = await engine.start(self._progress)
        except EngineError as error:
            _log.error("the engine did not start: %s", error, extra={"event": "engine_failed"})
            self._do(self._session.changed("failed", detail=str(error)))
            weak = isinstance(error, IsolationTooWeak)
            self._end(WorkerExit.TOO_WEAK if weak else WorkerExit.ENGINE_FAILED)
            return
        executors = int(deployment.get("executors", 1))
        self._seats = asyncio.Semaphore(executors)
        self._do(self._session.warm(executors=executors, facts=facts_of(info)))
        reason = await asyncio.shield(engine.died)  # else our own cancellation would cancel it
        _log.error("the engine died: %s", reason, extra={"event": "engine_died"})
        self._end(WorkerExit.ENGINE_DIED)

    def _progress(self, progress: Progress) -> None:
        share = min(1.0, progress.done / progress.total) if progress.total else None
        self._do(
            self._session.changed(
                "loading",
                detail=progress.stage,
                progress=share,
                done=progress.done,
                total=progress.total,
            )
        )

    # -- one request ---------------------------------------------------------------------------------------------------

    def _start(self, run: a.Run) -> None:
        grant = run.grant
        self._spawn(grant.request, grant.attempt, self._execute(grant))

    async def _execute(self, grant: m.Grant) -> None:
        uploading = self._results.uploading(grant.request, grant.attempt)
        blob_file = self.scratch / f"blob-{grant.request}-{grant.attempt}"
        try:
            outcome = await self._outcome(grant, blob_file, uploading)
            if outcome is not None:
                await self._answer(grant, outcome, uploading)
        finally:
            blob_file.unlink(missing_ok=True)
            await uploading.stop()

    async def _outcome(
        self, grant: m.Grant, blob_file: Path, uploading: Uploading
    ) -> Outcome | None:
        """Run it when a seat is free; None if the lease is gone by then."""
        if grant.blob is None:
            try:
                await self._fetch(grant, blob_file)
            except BlobDamaged as error:
                return Failed(kind=FailureKind.DAMAGED, message=f"{error}; send it again", meta={})
            except LinkExpired as error:
                self._return(grant, LeaseEnd.RELEASED, str(error))
                return None
        async with self._seats:
            engine = self._engine
            if engine is None or not self._session.holds(grant.request, grant.attempt):
                return None
            if engine.died.done():  # which is no doing of this request
                self._return(grant, LeaseEnd.RELEASED, engine.died.result())
                return None
            job = job_of(grant, blob_file if grant.blob is None else grant.blob)
            self.failpoints.hit("worker.run.before")
            self._do(self._session.began(grant.request, grant.attempt))
            began = self.clock.monotonic()
            outcome = await engine.run(job, lambda text: self._log(grant, text), uploading.grew)
            ran_s = round(self.clock.monotonic() - began, 6)
            self.requests += 1
            self.failpoints.hit("worker.run.after")
        return replace(outcome, meta={**outcome.meta, "runtime": ran_s})

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
                await asyncio.sleep(_RETRY_S)  # the lease says how long this makes sense
            else:
                return

    async def _answer(self, grant: m.Grant, outcome: Outcome, uploading: Uploading) -> None:
        end = lease_end(outcome)
        if isinstance(outcome, Failed) and end is not None:
            self._return(grant, end, outcome.message, **spent_of(outcome))
        elif isinstance(outcome, Saved) and outcome.file is not None:
            self._results.keep(grant.request, grant.attempt, outcome.file)
            await self._upload(grant, outcome, outcome.file, uploading)
        else:
            self._finish(done_of(grant, outcome, None))

    async def _upload(
        self, grant: m.Grant, saved: Saved, source: Path, uploading: Uploading
    ) -> None:
        key = (grant.request, grant.attempt)
        self._going_up[key] = (uploading, saved.size)
        try:
            parts = await uploading.finish(source, saved.size)
        except StoreGivenUp as error:
            _log.error(
                "a result was given up",
                extra={"event": "upload_given_up", "request": grant.request, "reason": str(error)},
            )
            failed = Failed(kind=FailureKind.ENGINE, message=str(error), meta=saved.meta)
            self._finish(done_of(grant, failed, None))
        else:
            self._finish(done_of(grant, saved, parts))
        finally:
            self._session.uploading(*key, sent=uploading.sent, size=saved.size)
            self._going_up.pop(key, None)

    def _upload_again(self, again: a.UploadAgain) -> None:
        grant, done = again.grant, again.done
        source = self._results.file(grant.request, grant.attempt)
        saved = Saved(inline=None, file=source, size=done.size, meta=done.meta)
        uploading = self._results.uploading(grant.request, grant.attempt)
        work = self._upload(grant, saved, source, uploading)
        self._spawn(grant.request, grant.attempt, work)

    def _finish(self, done: m.Done) -> None:
        self.failpoints.hit("worker.send.done.before")
        self._do(self._session.finished(done, self.clock.monotonic()))
        self.failpoints.hit("worker.send.done.after")

    def _return(self, grant: m.Grant, end: LeaseEnd, cause: str, **spent: str) -> None:
        evidence = {"cause": cause, **spent}
        self._do(self._session.returned(grant.request, grant.attempt, end, evidence))

    def _log(self, grant: m.Grant, text: str) -> None:
        if self._session.link is Link.GREETING:
            return  # nobody listens; what it prints is not kept
        for start in range(0, len(text), _LOG_CHARS):
            piece = text[start : start + _LOG_CHARS]
            self._send(m.Log(request=grant.request, attempt=grant.attempt, text=piece))

    # -- actions -------------------------------------------------------------------------------------------------------

    def _do(self, actions: list[a.Action]) -> None:
        for action in actions:
            self._on[type(action)](action)

    def _spawn(self, request: str, attempt: int, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=f"run-{request[:8]}")
        running = self._running[request] = _Running(attempt=attempt, task=task)
        task.add_done_callback(lambda _: self._ended(request, running))

    def _ended(self, request: str, running: _Running) -> None:
        if self._running.get(request) is running:
            del self._running[request]
        error = None if running.task.cancelled() else running.task.exception()
        if running.report:
            self._do(self._session.killed(request, running.attempt))
        elif error is not None:
            _log.error(
                "a request could not be run",
                exc_info=error,
                extra={"event": "run_failed", "request": request},
            )
            evidence = {"cause": repr(error)}
            self._do(self._session.returned(request, running.attempt, LeaseEnd.UNKNOWN, evidence))

    def _kill(self, kill: a.Kill) -> None:
        running = self._running.get(kill.request)
        if running is not None and running.attempt == kill.attempt:
            running.report = kill.report
            if (
                not running.task.cancelling()
            ):  # a second cancel would not wait for the executor's end
                running.task.cancel()
        elif kill.report:
            self._do(self._session.killed(kill.request, kill.attempt))

    def _welcomed(self, welcome: m.Welcome) -> None:
        self._results.welcomed(welcome)
        if not self._deployment.done() and welcome.deployment:
            self._deployment.set_result(welcome.deployment)

    def _refused(self, fatal: a.Fatal) -> None:
        _log.error(
            "refused by the relay: %s",
            fatal.detail,
            extra={"event": "refused", "code": fatal.code},
        )
        self._end(WorkerExit.REFUSED)

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

    def _end(self, code: WorkerExit) -> None:
        if not self._exit.done():
            self._exit.set_result(code)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for key, (uploading, size) in self._going_up.items():
                self._session.uploading(*key, sent=uploading.sent, size=size)
            self._do(self._session.tick(self.clock.monotonic()))

    async def _close(self, wire: Wire) -> None:
        running = [each.task for each in self._running.values()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._engine is not None:
            await self._engine.stop()
        await self.transfer.close()
        await wire.close()
