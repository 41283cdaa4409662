"""Which executors the pool orders, and when. The zygote is played here: the processes are real, but hold no model."""

from __future__ import annotations

import asyncio
import os
import socket
from asyncio.subprocess import Process, create_subprocess_exec
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import pytest

from edif_hpc.errors import EngineError
from edif_hpc.testing.engine import INFO
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.worker.engine.launch import OnProgress, Program
from edif_hpc.worker.engine.messages import (
    FROM_ZYGOTE,
    TO_EXECUTOR,
    TO_ZYGOTE,
    Done,
    Exited,
    Fork,
    Forked,
    Loaded,
    Ready,
    Refused,
    Run,
)
from edif_hpc.worker.engine.pool import FAILED_STARTS, Engine
from edif_hpc.worker.engine.protocol import (
    FROM_WORKER_BYTES,
    FROM_ZYGOTE_BYTES,
    AsyncChannel,
    PeerClosed,
)
from edif_hpc.worker.engine.values import EngineSpec, Job, Outcome, Saved

pytestmark = pytest.mark.anyio

WARM, COLD = True, False
SELF_TEST = b"self-test"
DEADLINE_S = 10.0


class PlayedZygote:
    """Forks what it is told to, notes each order, and lets every job run until the test ends it."""

    def __init__(self) -> None:
        self.orders: list[bool] = []  #: of each executor: whether it is to rehearse
        self.forks: list[Fork] = []
        self.alive: set[int] = set()
        self.most_alive = 0
        self.ready = Ready(steps=[])  #: what executors say
        self.refusal = ""  #: or this, instead
        self.refuse_beside = False  #: or that, while a job runs
        self.weights = "mapped"
        self.settled = asyncio.Event()  #: while it is not set, nobody is said to be gone
        self.settled.set()
        self.running: dict[int, asyncio.Event] = {}  #: by executor: what ends its job
        self._tasks: list[asyncio.Task[None]] = []
        self._processes: list[Process] = []

    async def launch(self, spec: EngineSpec, on_progress: OnProgress) -> Program:  # noqa: ARG002
        ours, theirs = socket.socketpair()
        channel = AsyncChannel(
            ours, accepts=FROM_ZYGOTE, receive_limit=FROM_ZYGOTE_BYTES, max_fds=1
        )
        own = AsyncChannel(theirs, accepts=TO_ZYGOTE, receive_limit=FROM_WORKER_BYTES, max_fds=2)
        await own.send(
            Loaded(info=asdict(INFO) | {"weights": self.weights}, selftests={"key": SELF_TEST})
        )
        self._tasks.append(asyncio.create_task(self._serve(own)))
        return Program("zygote", await idle_process(), channel)

    async def ended(self) -> None:
        """Wait until all is gone; the engine has been stopped before."""
        for process in self._processes:
            if process.returncode is None:
                process.kill()
        await asyncio.gather(*self._tasks)

    async def _serve(self, channel: AsyncChannel) -> None:
        playing: list[asyncio.Task[None]] = []
        with suppress(PeerClosed):
            while True:
                order, (sock, result) = await channel.receive()
                assert isinstance(order, Fork)
                os.close(result)
                self.orders.append(order.rehearse)
                self.forks.append(order)
                self.alive.add(order.executor)
                self.most_alive = max(self.most_alive, len(self.alive))
                own = AsyncChannel(
                    socket.socket(fileno=sock),
                    accepts=TO_EXECUTOR,
                    receive_limit=FROM_WORKER_BYTES,
                )
                playing.append(asyncio.create_task(self._play(order.executor, own, channel)))
        await asyncio.gather(*playing)
        channel.close()

    async def _play(self, number: int, own: AsyncChannel, zygote: AsyncChannel) -> None:
        """Be an executor: a process stands for it, a task speaks for it."""
        process = await idle_process()
        self._processes.append(process)
        speaking = asyncio.create_task(self._speak(number, own))
        try:
            pidfd = os.pidfd_open(process.pid)
            try:
                await zygote.send(Forked(executor=number, pid=process.pid), [pidfd])
            finally:
                os.close(pidfd)
            status = -await process.wait()
            await self.settled.wait()
            self.alive.remove(number)
            gone = Exited(
                executor=number,
                status=status,
                cpu_s=0.0,
                peak_rss_bytes=0,
                restored=2 if self.weights == "shared" else 0,
                restore_s=0.5 if self.weights == "shared" else 0.0,
            )
            await zygote.send(gone)
        except PeerClosed:  # the engine was stopped
            if process.returncode is None:
                process.kill()
                await process.wait()
        finally:
            speaking.cancel()
            await asyncio.gather(speaking, return_exceptions=True)
            own.close()

    async def _speak(self, number: int, channel: AsyncChannel) -> None:
        beside = self.refuse_beside and any(not each.is_set() for each in self.running.values())
        if self.refusal or beside:
            await channel.send(Refused(code="engine", message=self.refusal))
            return
        await channel.send(self.ready)
        run, _ = await channel.receive()
        assert isinstance(run, Run)
        if run.blob != SELF_TEST:
            self.running[number] = asyncio.Event()
            await self.running[number].wait()
        await channel.send(Done(inline=b"done", size=4, meta={}))


async def idle_process() -> Process:
    """A process that does nothing until it is killed."""
    return await create_subprocess_exec("sleep", "infinity", stderr=asyncio.subprocess.DEVNULL)


@pytest.fixture
async def zygote() -> AsyncIterator[PlayedZygote]:
    played = PlayedZygote()
    yield played
    await played.ended()


async def started(zygote: PlayedZygote, scratch: Path, ready: int, device: str = "cpu") -> Engine:
    spec = EngineSpec(
        model_key="key", source="source", scratch=scratch, ready=ready, device=device
    )
    engine = Engine(spec, zygote.launch)
    await engine.start()
    return engine


def begun(engine: Engine, number: int) -> asyncio.Task[Outcome]:
    job = Job(request_id=f"r{number}", attempt=1, blob=b"a job", compress=False)
    return asyncio.create_task(engine.run(job))


async def until_orders(zygote: PlayedZygote, *expected: bool) -> None:
    await wait_until_async(
        lambda: len(zygote.orders) >= len(expected), DEADLINE_S, "it orders executors"
    )
    assert zygote.orders == list(expected)


async def until_running(zygote: PlayedZygote, count: int) -> None:
    await wait_until_async(lambda: len(zygote.running) == count, DEADLINE_S, "jobs run")


async def test_an_executor_rehearses_when_nobody_waits(
    zygote: PlayedZygote, tmp_path: Path
) -> None:
    engine = await started(zygote, tmp_path / "engine", ready=2)
    try:
        # Two to begin with, and one in place of that which the self-test used up.
        await until_orders(zygote, WARM, WARM, WARM)
    finally:
        await engine.stop()


async def test_one_is_ordered_cold_when_jobs_run_and_none_is_ready(
    zygote: PlayedZygote, tmp_path: Path
) -> None:
    engine = await started(zygote, tmp_path / "engine", ready=2)
    try:
        await until_orders(zygote, WARM, WARM, WARM)
        await wait_until_async(lambda: len(engine._line.ready) == 2, DEADLINE_S, "both are ready")
        first = begun(engine, 1)
        await until_running(zygote, 1)
        assert len(zygote.orders) == 3, "one is left, so forking does not compete with the job"
        second = begun(engine, 2)
        await until_running(zygote, 2)
        await until_orders(zygote, WARM, WARM, WARM, COLD, COLD)
        for end in zygote.running.values():
            end.set()
        assert all(isinstance(each, Saved) for each in await asyncio.gather(first, second))
    finally:
        await engine.stop()


async def test_on_a_device_one_is_ordered_when_the_one_before_is_reaped(
    zygote: PlayedZygote, tmp_path: Path
) -> None:
    engine = await started(zygote, tmp_path / "engine", ready=2, device="cuda")
    try:
        await until_orders(zygote, WARM, WARM)
        jobs = [begun(engine, number) for number in range(3)]
        for count in range(1, len(jobs) + 1):
            await until_running(zygote, count)
            [*zygote.running.values()][-1].set()
        assert all(isinstance(each, Saved) for each in await asyncio.gather(*jobs))
        assert zygote.most_alive == 1
    finally:
        await engine.stop()


async def test_what_the_first_finds_on_a_device_the_others_are_told(
    zygote: PlayedZygote, tmp_path: Path
) -> None:
    zygote.ready = Ready(
        steps=[], device_name="A6000", free_bytes=[48], graded=["text-generation"]
    )
    spec = EngineSpec(model_key="key", source="s", scratch=tmp_path / "engine", device="cuda")
    engine = Engine(spec, zygote.launch)
    info = await engine.start()
    try:
        assert info.device_name == "A6000"
        await until_orders(zygote, WARM, WARM)
        assert [(each.free_bytes, each.graded) for each in zygote.forks] == [
            ([], []),
            ([48], ["text-generation"]),
        ]
    finally:
        await engine.stop()


async def test_executors_that_share_weights_are_ready_beside_each_other_and_have_jobs_one_by_one(
    zygote: PlayedZygote, tmp_path: Path
) -> None:
    zygote.weights = "shared"
    engine = await started(zygote, tmp_path / "engine", ready=2, device="cuda")
    try:
        jobs = [begun(engine, number) for number in range(3)]
        await until_running(zygote, 1)
        await wait_until_async(lambda: len(engine._line.ready) == 1, DEADLINE_S, "one is ready")
        assert zygote.orders == [WARM] * len(zygote.orders), "also beside one that runs"
        zygote.settled.clear()
        next(iter(zygote.running.values())).set()
        await wait_until_async(lambda: engine._line.ready, DEADLINE_S, "the next stays ready")
        assert len(zygote.running) == 1, "until the weights are as they were"
        assert not jobs[0].done(), "which is on the account of the first"
        zygote.settled.set()
        for count in (2, 3):
            await until_running(zygote, count)
            [*zygote.running.values()][-1].set()
        outcomes = await asyncio.gather(*jobs)
        assert zygote.most_alive == 2
        for each in outcomes:
            assert (each.meta["restored_tensors"], each.meta["restore_s"]) == (2, 0.5)
    finally:
        zygote.settled.set()
        await engine.stop()


async def test_who_keeps_the_next_from_becoming_ready_does_not_end_the_engine(
    zygote: PlayedZygote, tmp_path: Path
) -> None:
    zygote.weights, zygote.refusal = "shared", ""
    engine = await started(zygote, tmp_path / "engine", ready=1, device="cuda")
    try:
        zygote.refuse_beside = True
        for number in range(FAILED_STARTS + 1):
            job = begun(engine, number)
            await until_running(zygote, number + 1)
            await wait_until_async(
                lambda: engine._put_off or engine._line.ready, DEADLINE_S, "the next has tried"
            )
            [*zygote.running.values()][-1].set()
            assert isinstance(await job, Saved)
        assert not engine.died.done()
    finally:
        await engine.stop()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
async def test_why_no_executor_becomes_ready_is_why_the_engine_is_not_up(
    zygote: PlayedZygote, tmp_path: Path, device: str
) -> None:
    zygote.refusal = "the model is too large for this GPU"
    with pytest.raises(
        EngineError, match="3 executors in a row did not become ready: the model is"
    ):
        await started(zygote, tmp_path / "engine", ready=1, device=device)
