"""The worker's loop between a wire that remembers and an engine that obeys the test."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec
import pytest

from edif_hpc.domain.request import FailureKind
from edif_hpc.errors import EngineError, IsolationTooWeak
from edif_hpc.failpoints import Failpoints
from edif_hpc.slurm.order import WorkerExit
from edif_hpc.testing.clock import ManualClock
from edif_hpc.testing.engine import ScriptedEngine, failed, saved, saved_file
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.session import SILENCE_BEATS
from edif_hpc.wire.sockets import LinkEvent
from edif_hpc.worker.runtime import WorkerRuntime
from edif_hpc.worker.transfer import Transfer

T = TypeVar("T")

WAIT_S = 20.0
BEAT_S = 5.0
PART_BYTES = 100
BLOB = b"a large blob"
WELCOME = m.Welcome(
    version=1,
    lease_s=30.0,
    heartbeat_s=BEAT_S,
    part_bytes=PART_BYTES,
    deployment={"name": "tiny", "executors": 1},
)


@dataclass
class FakeWire:
    """Remembers what is sent."""

    sent: list[m.FromPeer] = field(default_factory=list)
    reconnects: int = 0
    full: bool = False
    closed: bool = False

    def send(self, frame: bytes) -> bool:
        if self.full:
            return False
        self.sent.append(codec.decode_from_peer(frame))
        return True

    def reconnect(self) -> None:
        self.reconnects += 1

    async def close(self) -> None:
        self.closed = True


@dataclass
@dataclass
class FakeStore:
    """The relay's HTTP: gives blobs and takes parts as a test says. An `int` is a status."""

    blobs: list[bytes | int | Exception] = field(default_factory=list)
    puts: list[int | Exception] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            return _answer(self.blobs.pop(0))
        body = await request.aread()
        answer = _answer(self.puts.pop(0) if self.puts else 200)
        if answer.is_success:
            self.stored[str(request.url)] = body
        return answer

    def transfer(self) -> Transfer:
        return Transfer(transport=httpx.MockTransport(self.answer))


def _answer(told: bytes | int | Exception) -> httpx.Response:
    if isinstance(told, Exception):
        raise told
    if isinstance(told, int):
        return httpx.Response(told, headers={"etag": '"etag"'})
    return httpx.Response(200, content=told)


CUT = httpx.ReadError("cut")


@dataclass
class Bench:
    """A running worker."""

    wire: FakeWire
    engine: ScriptedEngine
    store: FakeStore
    clock: ManualClock
    runtime: WorkerRuntime
    scratch: Path
    deployed: list[Any] = field(default_factory=list)
    running: asyncio.Task[WorkerExit] | None = None

    def hear(self, *messages: m.Message) -> None:
        self.runtime.received([codec.encode(each) for each in messages])

    async def says(self, kind: type[T], *, nth: int = 1) -> T:
        def found() -> list[T]:
            mine: list[T] = [each for each in self.wire.sent if isinstance(each, kind)]
            return mine[nth - 1 : nth]

        what = f"the worker says {kind.__name__} number {nth}; it said {self.wire.sent}"
        return (await wait_until_async(found, WAIT_S, what))[0]

    def said(self, kind: type[T]) -> list[T]:
        return [each for each in self.wire.sent if isinstance(each, kind)]

    async def warm(self) -> None:
        self.hear(WELCOME)
        await self.says(m.Pull)

    async def runs(self, request: str) -> None:
        await wait_until_async(lambda: request in self.engine.running, WAIT_S, f"{request} runs")

    async def exit(self) -> WorkerExit:
        assert self.running is not None
        return await asyncio.wait_for(asyncio.shield(self.running), WAIT_S)

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)


Start = Callable[..., Bench]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start workers."""
    benches: list[Bench] = []

    def make(*, failpoints: str = "", **engine: Any) -> Bench:
        scripted, store, clock = ScriptedEngine(**engine), FakeStore(), ManualClock()
        deployed: list[Any] = []

        def make_engine(deployment: Any) -> ScriptedEngine:
            deployed.append(deployment)
            return scripted

        runtime = WorkerRuntime(
            make_engine=make_engine,
            transfer=store.transfer(),
            scratch=tmp_path,
            clock=clock,
            failpoints=Failpoints.parse(failpoints),
            nonce="boot1",
        )
        bench = Bench(
            wire=FakeWire(),
            engine=scripted,
            store=store,
            clock=clock,
            runtime=runtime,
            scratch=tmp_path,
            deployed=deployed,
        )
        bench.running = asyncio.create_task(runtime.run(bench.wire))
        benches.append(bench)
        return bench

    yield make
    tasks = [each.running for each in benches if each.running is not None]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.fixture
async def bench(start: Start) -> Bench:
    """A worker that serves."""
    bench = start()
    await bench.says(m.Hello)
    await bench.warm()
    return bench


def grant(request: str = "r1", attempt: int = 1, **facts: Any) -> m.Grant:
    values: dict[str, Any] = {
        "model_key": "k",
        "compress": True,
        "env": {"attn_implementation": "sdpa"},
        "limits": {"wall_s": 1.5, "memory_bytes": 7.0, "newer_limit": 1.0},
        "blob": b"blob",
    }
    return m.Grant(request=request, attempt=attempt, **values | facts)


def large(request: str = "r1", attempt: int = 1) -> m.Grant:
    return grant(
        request,
        attempt,
        blob=None,
        blob_url="http://relay/blobs/r1",
        blob_bytes=len(BLOB),
        blob_sha256=hashlib.sha256(BLOB).hexdigest(),
    )


def lease(request: str = "r1", attempt: int = 1) -> dict[str, Any]:
    return {"request": request, "attempt": attempt}


# -- becoming warm -------------------------------------------------------------------------------


async def test_from_hello_to_warm(start: Start) -> None:
    bench = start(loading=True)
    hello = await bench.says(m.Hello)
    assert (hello.nonce, hello.state, hello.held) == ("boot1", "loading", [])
    bench.hear(WELCOME)
    loading = await bench.says(m.State)
    assert (loading.state, loading.detail, loading.progress) == ("loading", "weights", 0.5)
    assert (loading.done, loading.total) == (1, 2)
    assert bench.deployed == [WELCOME.deployment]
    assert bench.said(m.Pull) == []
    bench.engine.loaded.set()
    pull = await bench.says(m.Pull)
    assert (pull.window, pull.executors) == (2, 1)
    warm = bench.said(m.State)[-1]
    assert warm.state == "warm"
    assert warm.facts["versions"] == {"torch": "2.13.0", "nnsight": "0.8.1", "python": "3.11.9"}
    assert warm.facts["isolation"] == "full"


async def test_a_second_welcome_makes_no_second_engine(bench: Bench) -> None:
    bench.hear(m.Refused(code="unknown_session"))
    await bench.says(m.Hello, nth=2)
    bench.hear(WELCOME)
    await bench.says(m.Pull, nth=2)
    assert len(bench.deployed) == 1


# -- one request ---------------------------------------------------------------------------------


async def test_a_job_is_what_was_granted(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    (job,) = bench.engine.jobs
    assert (job.request_id, job.attempt, job.blob, job.compress) == ("r1", 1, b"blob", True)
    assert job.env == {"attn_implementation": "sdpa"}
    assert (job.limits.wall_s, job.limits.memory_bytes) == (1.5, 7)
    assert bench.said(m.Started) == [m.Started(**lease())]
    bench.pass_time(0.5)
    bench.engine.end("r1", saved(b"result"))
    done = await bench.says(m.Done)
    assert (done.inline, done.size, done.error, done.parts) == (b"result", 6, None, None)
    assert done.meta["runtime"] == 0.5


async def test_what_it_prints_is_sent_in_pieces(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.say("r1", "ü" * 50_000)
    assert "".join(each.text for each in bench.said(m.Log)) == "ü" * 50_000
    bench.hear(m.Refused(code="unknown_session"))
    before = len(bench.said(m.Log))
    bench.engine.say("r1", "nobody listens now")
    assert len(bench.said(m.Log)) == before


async def test_only_as_many_run_as_there_are_seats(bench: Bench) -> None:
    bench.hear(grant("r1"), grant("r2"))
    await bench.runs("r1")
    assert bench.engine.running == ["r1"]
    bench.engine.end("r1", saved(b"1"))
    await bench.runs("r2")


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (FailureKind.CRASH, "executor_crash"),
        (FailureKind.ENGINE, "executor_crash"),
        (FailureKind.OOM, "oom"),
    ],
)
async def test_an_executor_that_died_returns_the_lease(
    bench: Bench, kind: FailureKind, reason: str
) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.end("r1", failed(kind, "died of SIGSEGV" + "!" * 300))
    back = await bench.says(m.Return)
    assert back.reason == reason
    assert back.evidence["cause"].startswith("died of SIGSEGV")
    assert bench.said(m.Done) == []


@pytest.mark.parametrize("kind", [FailureKind.USER, FailureKind.TIMEOUT, FailureKind.LIMIT])
async def test_an_answer_that_is_an_error(bench: Bench, kind: FailureKind) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.end("r1", failed(kind, "x" * 70_000))
    done = await bench.says(m.Done)
    assert (done.error, len(done.message)) == (str(kind), 60_000)


async def test_memory_that_the_code_itself_ran_out_of_is_an_answer(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    caught = failed(FailureKind.OOM, "MemoryError")
    caught.meta.clear()
    bench.engine.end("r1", caught)
    assert (await bench.says(m.Done)).error == "oom"


async def test_a_meta_that_cannot_be_sent_returns_the_lease(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    outcome = saved(b"r")
    outcome.meta["large"] = "x" * (3 << 20)
    bench.engine.end("r1", outcome)
    back = await bench.says(m.Return)
    assert back.reason == "unknown"
    assert "cannot be sent" in back.evidence["cause"]


# -- blobs ---------------------------------------------------------------------------------------


async def test_a_large_blob_is_fetched_before_a_seat_is_taken(bench: Bench) -> None:
    bench.store.blobs = [BLOB]
    bench.hear(grant("r0"))
    await bench.runs("r0")
    bench.hear(large("r1"))
    await wait_until_async(lambda: not bench.store.blobs, WAIT_S, "the blob is fetched")
    assert bench.engine.running == ["r0"]
    bench.engine.end("r0", saved(b"r"))
    await bench.runs("r1")
    assert bench.engine.blobs[-1] == BLOB
    bench.engine.end("r1", saved(b"r"))
    await bench.says(m.Done, nth=2)
    assert list(bench.scratch.iterdir()) == [], "the blob is gone"


async def test_a_damaged_blob_is_an_answer(bench: Bench) -> None:
    bench.store.blobs = [BLOB[:-1] + b"?"]
    bench.hear(large())
    done = await bench.says(m.Done)
    assert done.error == "damaged"
    assert "send it again" in done.message
    assert bench.engine.jobs == []
    assert bench.said(m.Started) == []


async def test_a_relay_that_is_away_is_asked_again(bench: Bench) -> None:
    bench.store.blobs = [httpx.ConnectError("refused"), 503, BLOB]
    bench.hear(large())
    await bench.runs("r1")


async def test_an_expired_link_returns_the_lease(bench: Bench) -> None:
    bench.store.blobs = [403]
    bench.hear(large())
    back = await bench.says(m.Return)
    assert back.reason == "released"
    assert "expired" in back.evidence["cause"]


@pytest.mark.parametrize("told", [BLOB[:-1], BLOB[:-1] + b"?", b"", 404, 410])
async def test_the_bytes_of_a_blob_are_checked(bench: Bench, told: bytes | int) -> None:
    bench.store.blobs = [told]
    bench.hear(large())
    assert (await bench.says(m.Done)).error == "damaged"


# -- uploads -------------------------------------------------------------------------------------


async def answer_needs(bench: Bench, *, until_done: int = 1) -> m.Done:
    """Play the relay's part of an upload."""
    answered = 0

    def done() -> list[m.Done]:
        nonlocal answered
        needs = bench.said(m.Need)
        for need in needs[answered:]:
            numbers = range(need.first, need.first + need.count)
            urls = [f"http://relay/{number}" for number in numbers]
            bench.hear(m.Parts(**lease(), first=need.first, urls=urls))
        answered = len(needs)
        return bench.said(m.Done)[until_done - 1 : until_done]

    return (await wait_until_async(done, WAIT_S, "the upload is done"))[0]


async def large_result(bench: Bench) -> Path:
    file = bench.scratch / "result"
    await asyncio.to_thread(file.write_bytes, bytes(range(250)))
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.end("r1", saved_file(file))
    return file


async def test_a_large_result_goes_up_in_parts(bench: Bench) -> None:
    file = await large_result(bench)
    done = await answer_needs(bench)
    assert (done.size, done.inline) == (250, None)
    assert done.parts == [m.Part(number=each, etag="etag") for each in (1, 2, 3)]
    assert b"".join(bench.store.stored[f"http://relay/{each}"] for each in (1, 2, 3)) == bytes(
        range(250)
    )
    assert file.exists(), "until the relay has answered"
    bench.hear(m.Ack(**lease(), accepted=True))
    assert not file.exists()


async def test_how_much_is_up_is_told_with_the_heartbeat(bench: Bench) -> None:
    """Two parts of three are up when the relay has no more URLs."""
    await large_result(bench)
    need = await bench.says(m.Need)
    urls = ["http://relay/1", "http://relay/2"]
    bench.hear(m.Parts(**lease(), first=need.first, urls=urls))

    def told() -> bool:
        bench.clock.advance(BEAT_S)
        bench.hear(m.Beat())
        return any(
            each.sent == 2 * PART_BYTES and each.size == 250
            for beat in bench.said(m.Renew)
            for each in beat.held
        )

    await wait_until_async(told, WAIT_S, "a heartbeat says so")


async def test_a_part_that_fails_is_put_again(bench: Bench) -> None:
    bench.store.puts = [CUT, 403, 200, 507]
    await large_result(bench)
    done = await answer_needs(bench)
    assert done.parts is not None
    assert len(done.parts) == 3
    assert len(bench.store.stored) == 3


async def test_parts_that_the_relay_lost_are_put_again(bench: Bench) -> None:
    file = await large_result(bench)
    first = await answer_needs(bench)
    bench.store.stored.clear()
    bench.hear(m.Reupload(**lease()))
    second = await answer_needs(bench, until_done=2)
    assert second == first
    assert len(bench.store.stored) == 3
    assert file.exists()


async def test_a_cancelled_upload_leaves_no_file(bench: Bench) -> None:
    file = await large_result(bench)
    await bench.says(m.Need)
    bench.hear(m.Cancel(**lease(), reason="cancelled"))
    await bench.says(m.Return)
    assert not file.exists()


# -- taken away ----------------------------------------------------------------------------------


async def test_a_cancelled_run_is_killed_before_its_lease_is_returned(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.reaped.clear()
    bench.hear(m.Cancel(**lease(), reason="cancelled"))
    await wait_until_async(lambda: bench.engine.killed, WAIT_S, "it is killed")
    assert bench.said(m.Return) == []
    bench.hear(m.Cancel(**lease(), reason="cancelled"), m.Abandon(**lease()))
    bench.hear(grant("r2"))
    await asyncio.sleep(0)
    assert bench.engine.running == ["r1"], "its seat is not free before it is gone"
    bench.engine.reaped.set()
    await bench.runs("r2")
    assert bench.engine.killed == ["r1"]


async def test_a_waiting_lease_can_be_stolen(bench: Bench) -> None:
    bench.hear(grant("r1"), grant("r2"))
    await bench.runs("r1")
    bench.hear(m.Steal(**lease("r2")), m.Steal(**lease("r1")))
    assert bench.said(m.Return) == [m.Return(**lease("r2"), reason="stolen")]
    bench.engine.end("r1", saved(b"r"))
    await bench.says(m.Done)
    assert [each.request_id for each in bench.engine.jobs] == ["r1"]


async def test_a_newer_attempt_waits_for_the_end_of_the_older(bench: Bench) -> None:
    bench.hear(grant(attempt=1))
    await bench.runs("r1")
    bench.hear(grant(attempt=2))
    await wait_until_async(lambda: len(bench.engine.jobs) == 2, WAIT_S, "the newer one runs")
    bench.engine.end("r1", saved(b"r"))
    assert (await bench.says(m.Done)).attempt == 2


# -- ends ----------------------------------------------------------------------------------------


async def test_drain_with_running_work(bench: Bench) -> None:
    bench.hear(grant("r1"), grant("r2"))
    await bench.runs("r1")
    bench.runtime.drain("SIGTERM")
    assert bench.said(m.Return) == [m.Return(**lease("r2"), reason="drained")]
    assert bench.said(m.State)[-1].state == "draining"
    bench.engine.end("r1", saved(b"r"))
    await bench.says(m.Done)
    assert bench.running is not None
    assert not bench.running.done(), "its result is not acknowledged yet"
    bench.hear(m.Ack(**lease("r1"), accepted=True))
    assert await bench.exit() is WorkerExit.DRAINED
    assert bench.said(m.Goodbye) == [m.Goodbye(cause="SIGTERM")]
    assert bench.engine.stopped
    assert bench.wire.closed
    assert bench.runtime.transfer._http.is_closed


async def test_drain_while_the_model_loads(start: Start) -> None:
    bench = start(loading=True)
    await bench.says(m.Hello)
    bench.hear(WELCOME)
    await bench.says(m.State)
    bench.hear(m.Drain(reason="ordered"))
    assert await bench.exit() is WorkerExit.DRAINED
    assert bench.engine.stopped


async def test_drain_before_the_relay_answers(start: Start) -> None:
    bench = start()
    await bench.says(m.Hello)
    bench.runtime.drain("SIGTERM")
    assert await bench.exit() is WorkerExit.DRAINED
    assert bench.deployed == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineError("no weights"), WorkerExit.ENGINE_FAILED),
        (IsolationTooWeak("only process"), WorkerExit.TOO_WEAK),
    ],
)
async def test_an_engine_that_does_not_start(
    start: Start, error: EngineError, code: WorkerExit
) -> None:
    bench = start(refusal=error)
    await bench.says(m.Hello)
    bench.hear(WELCOME)
    assert await bench.exit() is code
    last = bench.said(m.State)[-1]
    assert (last.state, last.detail) == ("failed", str(error))


async def test_an_engine_that_dies(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.died.set_result("the zygote was killed")
    assert await bench.exit() is WorkerExit.ENGINE_DIED
    assert bench.engine.killed == ["r1"]


async def test_a_request_that_comes_when_the_engine_is_dead_goes_back_unharmed(
    bench: Bench,
) -> None:
    bench.engine.reaped.clear()  # what it ran takes its time to be gone
    bench.engine.died.set_result("the zygote was killed")
    await wait_until_async(lambda: bench.engine.stopped, WAIT_S, "the engine is being stopped")
    bench.hear(grant())
    try:
        back = await bench.says(m.Return)
    finally:
        bench.engine.reaped.set()
    assert (back.request, back.reason) == ("r1", "released")
    assert bench.engine.jobs == []
    assert await bench.exit() is WorkerExit.ENGINE_DIED


async def test_a_refusal_by_the_relay(bench: Bench) -> None:
    bench.hear(m.Refused(code="not_authenticated", detail="this key was revoked"))
    assert await bench.exit() is WorkerExit.REFUSED


async def test_a_refusal_at_the_door(bench: Bench) -> None:
    bench.runtime.saw(LinkEvent.REFUSED, "tcp://relay")
    assert await bench.exit() is WorkerExit.REFUSED


async def test_another_server_is_no_reason_to_leave(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.runtime.saw(LinkEvent.MISMATCH, "tcp://relay")
    assert "wrong server key" in caplog.text
    bench.hear(grant())
    await bench.runs("r1")


async def test_a_connection_that_comes_back_is_greeted_at_once(bench: Bench) -> None:
    """And what was asked on the one that broke is asked again; no heartbeat is waited for."""
    await large_result(bench)
    await bench.says(m.Need)
    hellos, needs = len(bench.said(m.Hello)), len(bench.said(m.Need))
    bench.runtime.saw(LinkEvent.CONNECTED, "tcp://relay")
    assert len(bench.said(m.Hello)) == hellos, "the first connection"
    bench.runtime.saw(LinkEvent.DISCONNECTED, "tcp://relay")
    bench.runtime.saw(LinkEvent.CONNECTED, "tcp://relay")
    bench.runtime.saw(LinkEvent.CONNECTED, "tcp://relay")
    assert len(bench.said(m.Hello)) == hellos + 1
    assert [each.request for each in bench.said(m.Hello)[-1].held] == ["r1"]
    bench.hear(msgspec.structs.replace(WELCOME, keep=bench.said(m.Hello)[-1].held))
    assert len(bench.said(m.Need)) == needs + 1


async def test_an_unforeseen_fault_closes_everything(start: Start) -> None:
    bench = start()

    def broken(_: Any) -> Any:
        raise RuntimeError("a mistake of ours")

    bench.runtime.make_engine = broken
    await bench.says(m.Hello)
    bench.hear(WELCOME)
    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        await bench.exit()
    assert bench.wire.closed


# -- the relay is away ---------------------------------------------------------------------------


async def test_silence_means_dialling_again(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.pass_time(SILENCE_BEATS * BEAT_S + 1)
    await wait_until_async(lambda: bench.wire.reconnects, WAIT_S, "it dials again")
    hello = await bench.says(m.Hello, nth=2)
    assert hello.held == [m.Held(request="r1", attempt=1, started=True)]
    assert bench.engine.running == ["r1"]


async def test_a_result_waits_for_the_relay(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.hear(m.Refused(code="unknown_session"))
    bench.engine.end("r1", saved(b"r"))
    await wait_until_async(lambda: not bench.engine.running, WAIT_S, "the run is over")
    assert bench.said(m.Done) == []
    keep = [m.Held(request="r1", attempt=1, started=True)]
    fields = {name: getattr(WELCOME, name) for name in WELCOME.__struct_fields__}
    bench.hear(m.Welcome(**fields | {"keep": keep}))
    assert (await bench.says(m.Done)).inline == b"r"


async def test_a_done_is_repeated(bench: Bench) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.engine.end("r1", saved(b"r"))
    await bench.says(m.Done)
    bench.pass_time(2 * BEAT_S)
    await bench.says(m.Done, nth=2)


async def test_a_full_queue_loses_nothing_that_matters(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.hear(grant())
    await bench.runs("r1")
    bench.wire.full = True
    bench.engine.end("r1", saved(b"r"))
    await wait_until_async(lambda: "was not queued" in caplog.text, WAIT_S, "it is told")
    bench.wire.full = False
    bench.pass_time(2 * BEAT_S)
    await bench.says(m.Done)


async def test_what_cannot_be_understood_is_told_and_skipped(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        bench.runtime.received([b"\xc1", codec.encode(grant())])
    assert "does not understand" in caplog.text
    await bench.runs("r1")


@pytest.mark.parametrize(
    "failpoint", ["worker.run.before", "worker.run.after", "worker.send.done.before"]
)
async def test_a_fault_in_the_loop_returns_the_lease(start: Start, failpoint: str) -> None:
    bench = start(failpoints=f"{failpoint}=raise", auto=lambda _: saved(b"r"))
    await bench.says(m.Hello)
    await bench.warm()
    bench.hear(grant())
    back = await bench.says(m.Return)
    assert back.reason == "unknown"
    assert failpoint in back.evidence["cause"]
    bench.hear(grant("r2"))
    assert (await bench.says(m.Done)).request == "r2", "the worker goes on"
