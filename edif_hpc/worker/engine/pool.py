"""The engine as the worker sees it: start it, run jobs, stop it.

Executors are forked ahead of need, so that a job finds one ready: locked up, warm, waiting. Each is used
once. Its replacement is ordered when the job has ended, if another one is ready, so that forking does
not compete with the job; and at once if none is. An executor rehearses before it is ready only when there
is time for it: not when jobs run and none is left to take, because then one waits for it, or will.

On a device one executor at a time has a job. Where each has a copy of the weights there is no room for a second: the next is
ordered when the one before is reaped, and is ready only when the memory of that is back (`device`). Where they share the weights
(`shared`) the next one is made ready beside it, and given a job when the one before is reaped and the weights are as they were.
What a request does to the device may keep it from that; then it is ordered again once the request is gone.

A job that failed for want of gradients has a second run, in another executor (`rerun`). A job ends in one of these ways: the executor says so; it dies (then the evidence decides between a crash
and memory that ran out); its time is over; or the caller cancels the task, and then `run` returns only
when the process is reaped. When the zygote dies, all executors die with it, every job ends with the kind
`engine`, and `Engine.died` is set: the worker starts a new engine.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edif_hpc.domain.limits import overrun
from edif_hpc.domain.request import kind_of
from edif_hpc.errors import EngineError, OverLimit, RemoteProtocolError
from edif_hpc.worker.engine import evidence
from edif_hpc.worker.engine.cost import Cost, measured
from edif_hpc.worker.engine.launch import Launch, Program, described, emptied, launched, trials
from edif_hpc.worker.engine.line import Line
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
        self._line = Line(alone=spec.alone)
        #: Whether executors have the same weights on a device, so that one may be ready beside another.
        self._shared = False
        #: Whether the next is ordered when the one that runs is gone, and not before.
        self._put_off = False
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
            self._shared = info.weights == "shared"
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
        outcome, spent = await self._turn(job, turn, said.first, on_written)
        told: dict[str, Plain] = {}
        if isinstance(outcome, Lacked):
            turn = replace(turn, gradients=True, wall_s=turn.wall_s - spent.runtime_s)
            outcome, more = await self._turn(job, turn, said.again, on_written)
            spent += more
            told["gradients"] = "retried"
        return replace(outcome, meta=outcome.meta | told | spent.told(outcome))

    async def _turn(
        self,
        job: Job,
        turn: Turn,
        on_log: Callable[[str], None],
        on_written: Callable[[Path, int], None],
    ) -> tuple[Outcome, Cost]:
        """Run the job in one executor; return how that ended and what it took."""
        seat = await self._take()
        if seat is None:
            return self._engine_failure(), Cost()
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            outcome = await self._ended(seat, job, turn, on_log, on_written)
        finally:
            seat.kill()
            self._refill()
        return outcome, measured(
            outcome,
            runtime_s=clock() - began,
            meter=seat.meter,
            began_cpu_s=seat.began_cpu_s,
            exited=seat.exited.result() if seat.exited.done() else None,
        )

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
            watched = self._zygote.watch.over(seat, job.limits)
            async with asyncio.timeout(turn.wall_s), watched:
                outcome = await seat.run(job, turn, on_log, on_written)
            await self._see_off(seat, outcome)
        except TimeoutError:
            over = overrun(
                job.limits, "wall_s", f"the request was stopped after {job.limits.wall_s:g} s"
            )
            return await self._went_over(seat, over)
        except OverLimit as over:
            return await self._went_over(seat, over)
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

    async def _see_off(self, seat: Seat, outcome: Outcome) -> None:
        """Have the executor gone before the outcome is told, where something depends on it."""
        in_file = isinstance(outcome, Saved) and outcome.file is not None
        if in_file or self._shared or isinstance(outcome, Lacked):
            # Nobody writes to the file from here on; weights are put right on its account; its memory is back for the next run.
            seat.kill()
            await self._reaped(seat)
        if isinstance(outcome, Saved) and in_file:
            seat.confirm(outcome)

    # -- executors -----------------------------------------------------------

    async def _take(self) -> Seat | None:
        """Return a ready executor, or `None` if there will be none."""
        if self.died.done():
            return None
        return await self._line.take(self._refill)

    def _refill(self) -> None:
        """Order as many executors as are missing."""
        self._put_off = self._put_off and self._line.held_up
        room = 1 + self._shared - len(self._seats)
        if self.died.done() or self._put_off or (self.spec.alone and room <= 0):
            return
        rehearse = bool(self._line.ready) or self._running == 0 or self._line.held_up
        wanted = 1 if self.spec.alone else self.spec.ready
        for _ in range(wanted - len(self._line.ready) - self._warming):
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
            self._line.offer(seat)
            if self._shared and not self._line.ready:
                self._refill()
        await seat.exited
        async with seat.heard:
            self._seats.pop(seat.number).clear()
        lost = self._line.gone(seat)
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
        if self._line.held_up:
            self._put_off = True  # a request has the device; nothing is told of the engine by this
            return
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

    async def _went_over(self, seat: Seat, over: OverLimit) -> Failed:
        failed = await self._failed(seat, kind_of(over), str(over))
        return replace(failed, meta={"error": dict(over.details)})

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
        self._line.close()

    def _engine_failure(self) -> Failed:
        text = "the server lost the process that held the model; nothing is wrong with the request"
        return Failed(kind=FailureKind.ENGINE, message=text, meta={"cause": self.died.result()})

    async def _self_test(self, blobs: Mapping[str, bytes]) -> None:
        """Run the self-test of each task, and that of the first with each adapter."""
        for which, job in trials(blobs, self.spec.adapters):
            outcome = await self.run(job)
            if self.died.done():
                raise EngineError(self.died.result())
            if isinstance(outcome, Failed):
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
