"""The engine as the worker sees it: start it, run jobs, stop it.

Executors are forked ahead of need, so that a job finds one ready: locked up, warm, waiting. Each is used
once. Its replacement is ordered when the job has ended, if another one is ready, so that forking does
not compete with the job; and at once if none is. An executor rehearses before it is ready only when there
is time for it: not when jobs run and none is left to take, because then one waits for it, or will.

On a device every executor has all the weights, so there is one at a time: the next is ordered when the one
before is reaped, and is ready only when the memory of that is back (`device`).

A job that failed for want of gradients has a second run, in another executor (`rerun`). A job ends in one of these ways: the executor says so; it dies (then the evidence decides between a crash
and memory that ran out); its time is over; or the caller cancels the task, and then `run` returns only
when the process is reaped. When the zygote dies, all executors die with it, every job ends with the kind
`engine`, and `Engine.died` is set: the worker starts a new engine.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edif_hpc.errors import EngineError, RemoteProtocolError
from edif_hpc.worker.engine import evidence
from edif_hpc.worker.engine.launch import Launch, Program, described, emptied, launched
from edif_hpc.worker.engine.messages import Exited, Fork, Forked, Loaded, Message, Ready, Refused
from edif_hpc.worker.engine.protocol import PeerClosed
from edif_hpc.worker.engine.rerun import Lacked, Said, Turn
from edif_hpc.worker.engine.seat import Seat
from edif_hpc.worker.engine.values import (
    EngineInfo,
    EngineSpec,
    Failed,
    FailureKind,
    Job,
    Limits,
    Outcome,
    Plain,
    Progress,
    Saved,
)

#: So many executors in a row that do not become ready end the engine.
FAILED_STARTS = 3


def quiet(*_: object) -> None:
    """Take no notice."""


class Engine:
    """One loaded model and the executors that run requests on it."""

    def __init__(self, spec: EngineSpec, launch: Launch = launched) -> None:
        self.spec = spec
        self._launch = launch
        #: Why the engine is dead, once it is. Made by `start`, which knows the loop.
        self.died: asyncio.Future[str]
        self._zygote: Program
        self._numbers = itertools.count(1)
        self._seats: dict[int, Seat] = {}
        self._ready: deque[Seat] = deque()
        self._waiting: deque[asyncio.Future[Seat | None]] = deque()
        self._warming = 0
        self._running = 0
        self._failed_starts = 0
        #: What the first executor said of its device.
        self._first: Ready | None = None
        self._oom_kills = evidence.oom_kills()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life ----------------------------------------------------------------

    async def start(self, on_progress: Callable[[Progress], None] = quiet) -> EngineInfo:
        """Load the model, fill the pool, run the self-test.

        Raises:
            IsolationTooWeak: the floor cannot be reached on this machine.
            EngineError: anything else went wrong; the message says what was seen.
        """
        self.died = asyncio.get_running_loop().create_future()
        emptied(self.spec.scratch)
        try:
            async with asyncio.timeout(self.spec.load_timeout_s):
                self._zygote = await self._launch(self.spec, on_progress)
                return await self._loaded(on_progress)
        except TimeoutError as error:
            raise EngineError(
                f"the engine is not up after {self.spec.load_timeout_s} s"
            ) from error

    async def _loaded(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        self._spawn(self._zygote.follow_stderr(), "engine-stderr")
        try:
            loaded = await self._zygote.expect(Loaded, on_progress)
            info = described(loaded)
            self._spawn(self._listen(), "engine-control")
            self._refill()
            on_progress(Progress(stage="self-test"))
            await self._self_test(loaded.selftests)
        except BaseException:
            await self.stop()
            raise
        return replace(info, device_name=self._first.device_name if self._first else "")

    async def stop(self) -> None:
        """End every process and wait until they are gone."""
        self._die("the engine was stopped")
        await self._zygote.process.wait()
        await asyncio.gather(*(seat.gone() for seat in self._seats.values()))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._zygote.channel.close()
        for seat in self._seats.values():
            seat.clear()
        self._seats.clear()

    async def run(
        self,
        job: Job,
        on_log: Callable[[str], None] = quiet,
        on_written: Callable[[Path, int], None] = quiet,
    ) -> Outcome:
        """Run one job, in executors of its own, and return how it ended.

        `on_log` gets what it prints. `on_written` gets the result's file and how many of its bytes are
        final, while it grows. Cancelling the calling task kills the executor; `CancelledError` is raised
        when it is reaped.
        """
        self._running += 1
        try:
            return await self._run(job, on_log, on_written)
        finally:
            self._running -= 1

    async def _run(
        self, job: Job, on_log: Callable[[str], None], on_written: Callable[[Path, int], None]
    ) -> Outcome:
        turn = Turn(seed=secrets.randbits(32), gradients=False, wall_s=job.limits.wall_s)
        said = Said(on_log)
        outcome, runtime_s = await self._turn(job, turn, said.first, on_written)
        told: dict[str, Plain] = {}
        if isinstance(outcome, Lacked):
            turn = replace(turn, gradients=True, wall_s=turn.wall_s - runtime_s)
            outcome, more_s = await self._turn(job, turn, said.again, on_written)
            runtime_s += more_s
            told["gradients"] = "retried"
        # Measured here: what the executor says of its own time need not be so.
        return replace(outcome, meta=outcome.meta | told | {"runtime_s": round(runtime_s, 6)})

    async def _turn(
        self,
        job: Job,
        turn: Turn,
        on_log: Callable[[str], None],
        on_written: Callable[[Path, int], None],
    ) -> tuple[Outcome, float]:
        """Run the job in one executor; return how that ended and how long it took."""
        seat = await self._take()
        if seat is None:
            return self._engine_failure(), 0.0
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            outcome = await self._ended(seat, job, turn, on_log, on_written)
        finally:
            seat.kill()
            self._refill()
        return outcome, clock() - began

    async def _ended(
        self,
        seat: Seat,
        job: Job,
        turn: Turn,
        on_log: Callable[[str], None],
        on_written: Callable[[Path, int], None],
    ) -> Outcome:
        """Run the job to one of its ends."""
        try:
            async with asyncio.timeout(turn.wall_s):
                outcome = await seat.run(job, turn, on_log, on_written)
            if isinstance(outcome, Lacked):
                seat.kill()  # its memory is back before the job runs again
                await self._reaped(seat)
            if isinstance(outcome, Saved) and outcome.file is not None:
                seat.kill()  # nobody writes to the file from here on
                await self._reaped(seat)
                seat.confirm(outcome)
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
        return outcome

    # -- executors -----------------------------------------------------------

    async def _take(self) -> Seat | None:
        """Return a ready executor, or `None` if there will be none."""
        if self.died.done():
            return None
        if self._ready:
            seat = self._ready.popleft()
            if not self._ready:
                self._refill()
            return seat
        waiter: asyncio.Future[Seat | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        self._refill()
        try:
            return await waiter
        except asyncio.CancelledError:
            given = waiter.result() if waiter.done() and not waiter.cancelled() else None
            if given is not None:
                self._offer(given)
            raise

    def _offer(self, seat: Seat) -> None:
        """Give a ready executor to who waits longest, or keep it."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(seat)
                return
        self._ready.append(seat)

    def _refill(self) -> None:
        """Order as many executors as are missing."""
        if self.died.done() or (self.spec.alone and self._seats):
            return
        rehearse = bool(self._ready) or self._running == 0
        wanted = 1 if self.spec.alone else self.spec.ready
        for _ in range(wanted - len(self._ready) - self._warming):
            self._warming += 1
            self._spawn(self._hire(rehearse=rehearse), "engine-executor")

    async def _hire(self, *, rehearse: bool) -> None:
        """Have an executor forked, see it ready, and later see it reaped."""
        seat = Seat(next(self._numbers), self.spec.scratch)
        self._seats[seat.number] = seat
        try:
            async with asyncio.timeout(self.spec.ready_timeout_s):
                order = self._order(seat.number, rehearse=rehearse)
                await self._zygote.channel.send(order, [seat.theirs.fileno(), seat.result_fd])
                seat.handed_over()
                ready = await seat.ready()
        except (EngineError, PeerClosed, RemoteProtocolError, TimeoutError) as error:
            seat.kill()
            self._warming -= 1
            self._failed_start(error)
        else:
            self._warming -= 1
            self._failed_starts = 0
            self._first = self._first or ready
            self._offer(seat)
        await seat.exited
        async with seat.heard:
            self._seats.pop(seat.number).clear()
        lost = seat in self._ready
        if lost:
            self._ready.remove(seat)
        if lost or self.spec.alone:
            self._refill()

    def _order(self, number: int, *, rehearse: bool) -> Fork:
        first = self._first
        if first is None:
            return Fork(executor=number, rehearse=rehearse)
        return Fork(
            executor=number,
            rehearse=rehearse,
            free_bytes=first.free_bytes,
            graded=first.graded,
        )

    def _failed_start(self, error: Exception) -> None:
        self._failed_starts += 1
        if self._failed_starts >= FAILED_STARTS:
            said = str(error) if isinstance(error, EngineError) else repr(error)
            self._die(f"{FAILED_STARTS} executors in a row did not become ready: {said}")
        else:
            self._refill()

    async def _reaped(self, seat: Seat) -> Exited | None:
        """Wait until the executor is gone; `None` if the zygote is, and took it along."""
        either: set[asyncio.Future[Any]] = {seat.exited, self.died}
        timeout_s = self.spec.reap_timeout_s
        await asyncio.wait(either, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if seat.exited.done():
            return seat.exited.result()
        self._die(f"executor {seat.number} is not gone {timeout_s:g} s after SIGKILL")
        return None

    async def _failed(self, seat: Seat, kind: FailureKind, text: str) -> Failed:
        seat.kill()
        await self._reaped(seat)
        return Failed(kind=kind, message=text, meta={})

    async def _post_mortem(self, seat: Seat, limits: Limits) -> Failed:
        """Say why an executor died that nobody killed."""
        exited = await self._reaped(seat)
        if exited is None:
            return self._engine_failure()
        before, self._oom_kills = self._oom_kills, evidence.oom_kills()
        kind, text = evidence.judge(exited, limits, out_of_memory=self._oom_kills > before)
        meta: dict[str, Plain] = {"killed": True, "peak_rss_bytes": exited.peak_rss_bytes}
        return Failed(kind=kind, message=text, meta=meta)

    # -- zygote --------------------------------------------------------------

    async def _listen(self) -> None:
        """Follow what the zygote says about executors, until it is gone."""
        try:
            while True:
                message, fds = await self._zygote.channel.receive()
                self._heard(message, fds)
        except PeerClosed:
            self._die(await self._zygote.ended())
        except (RemoteProtocolError, KeyError) as error:
            self._die(f"the zygote broke its protocol: {error!r}")

    def _heard(self, message: Message, fds: list[int]) -> None:
        match message:
            case Forked(executor=number):
                self._seats[number].forked(fds[0])
            case Exited(executor=number):
                self._seats[number].exited.set_result(message)
            case Refused(message=text):
                self._die(text)
            case _:
                raise RemoteProtocolError(f"{type(message).__name__} while serving")

    def _die(self, reason: str) -> None:
        """Declare the engine dead, once: nothing more will come of it."""
        if self.died.done():
            return
        self.died.set_result(reason)
        self._zygote.kill()
        for seat in self._seats.values():
            seat.kill()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
        self._waiting.clear()

    def _engine_failure(self) -> Failed:
        text = "the server lost the process that held the model; nothing is wrong with the request"
        return Failed(kind=FailureKind.ENGINE, message=text, meta={"cause": self.died.result()})

    async def _self_test(self, blobs: Mapping[str, bytes]) -> None:
        """Run the self-test of each task, and that of the first with each adapter."""
        first = next(iter(blobs))
        tests: list[tuple[str, dict[str, Plain]]] = [(key, {}) for key in blobs]
        tests += [(first, {"peft": each.repo_id}) for each in self.spec.adapters]
        for key, env in tests:
            job = Job(
                request_id="self-test",
                attempt=0,
                blob=blobs[key],
                compress=True,
                env=env,
                model_key=key,
            )
            outcome = await self.run(job)
            if self.died.done():
                raise EngineError(self.died.result())
            if isinstance(outcome, Failed):
                which = f"with the adapter {env['peft']}" if env else f"of {key}"
                raise EngineError(
                    f"the self-test {which} failed ({outcome.kind}): {outcome.message} {outcome.meta}"
                )

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        """A task of ours that breaks takes the engine with it, visibly."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._die(f"{task.get_name()} broke: {error!r}")
