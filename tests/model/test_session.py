"""Workers and the relay over a network that loses, delays and reorders, with deaths on both sides.

A Hypothesis machine drives the real `WorkerSession`s, each with a small fake runtime, and the real core
of the relay (board, leasing, outcomes, broker, fleet, gateway, scheduler) over the store in memory. What
is between them is `Network`: within one connection messages keep their order, as in ZeroMQ; a connection
that drops loses what was under way; what an old connection had already sent may still arrive, after what
a newer one says. Commits wait, fail, or die with the relay. Time is a manual clock, also the loop's, so
that every run is deterministic.

At the end the faults stop: then every accepted request must end exactly once, with its own result or an
honest error, and neither side may be left with a lease, a seat or a deadline that nobody needs.

`MODEL_EXAMPLES=2000 pytest tests/model/test_session.py` looks deeper.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edif_hpc.domain.allocation import PeerRole
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.request import FailureKind, Limits, NewRequest, Request, RequestState
from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.objects.signing import Signer
from edif_hpc.relay.core import Core
from edif_hpc.relay.sessions import Session
from edif_hpc.settings import RelaySettings
from edif_hpc.store.memory import MemoryStore
from edif_hpc.testing.clock import ManualClock
from edif_hpc.testing.writer import SteppedWriter
from edif_hpc.wire import actions as a
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.session import WorkerSession
from edif_hpc.wire.sockets import Incoming

LEASE_S, HEARTBEAT_S, STEP_S = 6.0, 1.0, 0.5
DEPLOYMENT = Deployment(name="tiny", repo_id="a/b", revision=None, task="text-generation")
SLOTS = [0, 1]
CALM = st.sampled_from([True, True, False])  #: whether everything arrives afterwards
LOST = set(LeaseEnd)
ROUNDS_TO_RECOVER = 400
ENOUGH_RUNS = 8


def result_of(request: str) -> bytes:
    return f"result of {request}".encode()


# -- time and threads under control --------------------------------------------------------------


class Inline(ThreadPoolExecutor):
    """Runs at once what should run in a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


class Overheard(logging.Handler):
    """What nobody awaits cannot raise; when it goes wrong it is logged, and here that is a fault."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        logging.getLogger("edif_hpc.relay").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info is not None:
            self.found.append(self.format(record))

    def close(self) -> None:
        logging.getLogger("edif_hpc.relay").removeHandler(self)
        super().close()


class SteppedLoop(asyncio.SelectorEventLoop):
    """A loop whose time is a manual clock."""

    def __init__(self, clock: ManualClock) -> None:
        self._manual = clock
        super().__init__()
        self.set_default_executor(Inline(max_workers=1))
        self.faults = Overheard()
        self.set_exception_handler(lambda _, context: self.faults.found.append(str(context)))

    def time(self) -> float:
        return self._manual.monotonic()


class NoDisk:
    """Blobs and objects that nobody uses here."""

    part_bytes = 1 << 20

    def sweep(self, *_: Any, **__: Any) -> Any:
        return _Done(0)

    def delete(self, *_: Any) -> None:
        pass


class _Done(int):
    def __await__(self) -> Any:
        yield from ()
        return 0


# -- the network ---------------------------------------------------------------------------------


@dataclass
class Connection:
    """One connection of one peer. `up` and `down` hold frames under way."""

    key: str
    route: bytes
    up: deque[bytes] = field(default_factory=deque)
    down: deque[bytes] = field(default_factory=deque)


class Network:
    """All connections; the newest of a key is the one that its peer listens to."""

    def __init__(self) -> None:
        self.made = 0
        self.newest: dict[str, Connection] = {}
        self.old: list[Connection] = []
        self.log: list[str] = []

    def dial(self, key: str, *, lost: int | None = None) -> Connection:
        """A new connection; the old one's `lost` first messages are gone, the others arrive some time."""
        before = self.newest.pop(key, None)
        self.made += 1
        made = self.newest[key] = Connection(key=key, route=b"\0" + self.made.to_bytes(4, "big"))
        if before is not None and lost is not None:
            before.up = deque(list(before.up)[lost:])
            before.down.clear()
            if before.up:
                self.old.append(before)
        return made

    def redial(self, key: str, *, lost: int) -> None:
        """What libzmq does by itself after a cut: the same queue, another route, holes."""
        before = self.newest.get(key)
        if before is not None:
            made = self.dial(key)
            made.up = deque(list(before.up)[lost:])

    def waiting(self) -> list[Connection]:
        """Connections with something for the relay."""
        return [each for each in [*self.newest.values(), *self.old] if each.up]

    # -- the relay's socket, as the gateway sees it

    def send(self, route: bytes, frame: bytes) -> bool:
        for each in self.newest.values():
            if each.route == route:
                each.down.append(frame)
                return True
        return False

    def drain(self) -> None:
        """Nothing lies unread in the relay's socket: what is under way is under way."""


# -- a worker ------------------------------------------------------------------------------------


@dataclass
class FakeWorker:
    """A process: a session, and executors that run what they are told, one at a time."""

    key: str
    nonce: str
    network: Network
    clock: ManualClock
    session: WorkerSession = field(init=False)
    waiting: list[m.Grant] = field(default_factory=list)
    running: m.Grant | None = None
    dying: list[tuple[m.Grant, bool]] = field(default_factory=list)
    left: str | None = None

    def __post_init__(self) -> None:
        self.session = WorkerSession(nonce=self.nonce, window=0, executors=1)

    def boot(self) -> None:
        self.network.dial(self.key)
        self.do(self.session.connected(self.clock.monotonic()))

    def hear(self, count: int) -> None:
        """Read messages of the relay."""
        now = self.clock.monotonic()
        for _ in range(count):
            link = self.network.newest.get(self.key)
            if self.left is not None or link is None or not link.down:
                return
            self.do(self.session.received(codec.decode_from_relay(link.down.popleft()), now))

    def begin(self) -> tuple[str, int] | None:
        """The executor takes the next request, if it is free; returns its lease."""
        if self.running is not None or self.dying or not self.waiting:
            return None
        grant = self.running = self.waiting.pop(0)
        self.do(self.session.began(grant.request, grant.attempt))
        return grant.request, grant.attempt

    def finish(self, how: str) -> None:
        """The executor ends: `ok`, `user` (the code failed) or `crash`."""
        grant, self.running = self.running, None
        if grant is None:
            return
        lease = {"request": grant.request, "attempt": grant.attempt}
        if how == "crash":
            end = LeaseEnd.EXECUTOR_CRASH
            self.do(self.session.returned(grant.request, grant.attempt, end, {"cause": "SIGSEGV"}))
            return
        ok = m.Done(**lease, inline=result_of(grant.request))
        failed = m.Done(**lease, error="user", message="ZeroDivisionError")
        self.do(self.session.finished(ok if how == "ok" else failed, self.clock.monotonic()))

    def reap(self) -> None:
        """Killed executors are gone now."""
        dying, self.dying = self.dying, []
        for grant, report in dying:
            if report:
                self.do(self.session.killed(grant.request, grant.attempt))

    def do(self, actions: Iterable[a.Action]) -> None:
        for action in actions:
            match action:
                case a.Send():
                    self.network.newest[self.key].up.append(codec.encode(action.message))
                case a.Run():
                    self.waiting.append(action.grant)
                case a.Kill():
                    self.kill(action)
                case a.Reconnect():
                    self.network.dial(self.key, lost=0)
                    self.do(self.session.connected(self.clock.monotonic()))
                case a.Leave():
                    assert self.session.held == 0, "it leaves while it holds something"
                    self.left = action.cause
                case a.Fatal():
                    raise AssertionError(f"the relay refused a worker: {action}")

    def kill(self, action: a.Kill) -> None:
        lease = (action.request, action.attempt)
        if self.running is not None and (self.running.request, self.running.attempt) == lease:
            self.dying.append((self.running, action.report))
            self.running = None
            return
        found = [each for each in self.waiting if (each.request, each.attempt) == lease]
        self.waiting = [each for each in self.waiting if each not in found]
        if action.report:
            self.do(self.session.killed(*lease))


# -- the relay -----------------------------------------------------------------------------------


class FakeRelay:
    """One process of the relay: the real core on what outlives it."""

    def __init__(self, store: MemoryStore, clock: ManualClock, network: Network) -> None:
        self.writer = SteppedWriter(store)
        self.writer.start()
        nothing = NoDisk()
        self.core = Core(
            RelaySettings(lease_s=LEASE_S, heartbeat_s=HEARTBEAT_S),
            store=store,
            writer=self.writer,
            objects=cast("Any", nothing),
            blobs=cast("BlobFolder", nothing),
            signer=Signer(secret=b"s" * 32),
            clock=clock,
            failpoints=Failpoints(),
            server_key="k" * 40,
        )
        self.core.attach(network, endpoint="tcp://relay", base_url="http://relay")
        self.core.restore()
        for _ in range(ENOUGH_RUNS):  # so that workers may prefetch
            self.core.fleet.times("tiny").add(0.1)
        self.sessions: dict[str, Session] = {}

    def ends_told(self, request: str) -> int:
        session = self.sessions.get(request)
        return 0 if session is None else sum(each.final for each in session._waiting)


# -- the machine ---------------------------------------------------------------------------------


class SessionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.loop = SteppedLoop(self.clock)
        self.store = MemoryStore()
        self.store.open()
        self.network = Network()
        self.workers: dict[int, FakeWorker] = {}
        self.keys: dict[int, str] = {}
        self.allocations: dict[int, str] = {}
        self.boots = 0
        self.requests: list[str] = []
        self.cancelled: set[str] = set()
        self.begun: list[tuple[str, int]] = []
        self.faults = False

    # -- running things on the loop

    def run(self, work: Callable[[], Coroutine[Any, Any, Any] | Any]) -> Any:
        """Do something on the loop, and let everything that follows from it happen."""

        async def settled() -> Any:
            found = work()
            task = asyncio.ensure_future(found) if asyncio.iscoroutine(found) else None
            for _ in range(30):
                await asyncio.sleep(0)
            if task is None:
                return found
            if not task.done():
                self.pending.append(task)
                return None
            error = task.exception()
            if isinstance(error, StoreUnavailable):
                return None  # an honest 503: nothing happened
            return task.result()

        found = self.loop.run_until_complete(settled())
        assert not self.loop.faults.found, self.loop.faults.found
        return found

    @initialize()
    def begin(self) -> None:
        self.pending: list[asyncio.Future[Any]] = []
        self.relay = self.run(lambda: FakeRelay(self.store, self.clock, self.network))
        self.run(lambda: self.relay.core.fleet.add_deployment(DEPLOYMENT))
        for slot in SLOTS:
            self.join(slot)
            self.boot(slot)
            self.exchange()
            self.warm(slot, calm=False)
        self.exchange()

    def join(self, slot: int) -> None:
        made = self.run(
            lambda: self.relay.core.fleet.allocate("tiny", site="local", slots=slot + 1)
        )
        self.allocations[slot] = made[-1]["allocation"].id
        self.keys[slot] = f"worker-{slot}-{len(self.allocations)}".ljust(40, "x")
        self.run(
            lambda: self.relay.core.fleet.join(
                made[-1]["join_token"],
                worker_key=self.keys[slot],
                pilot_key=self.keys[slot].replace("worker", "pilots"),
                node="node",
            )
        )

    # -- clients

    @precondition(lambda self: len(self.requests) < 10)
    @rule(owner=st.sampled_from(["ada", "bob"]), burst=st.integers(1, 3), calm=CALM)
    def accept(self, owner: str, burst: int, *, calm: bool) -> None:
        """Requests come; while commits wait, or fail, their clients know of nothing."""
        for _ in range(burst):
            name = f"{len(self.requests):032x}"
            self.requests.append(name)
            session = Session(id=name, owner=owner, base_url="http://relay")
            self.relay.sessions[name] = session
            new = self.new_request(name, owner)
            self.run(lambda new=new, own=session: self.relay.core.broker.accept(new, b"b", own))
        if calm:
            self.exchange()

    def new_request(self, name: str, owner: str) -> NewRequest:
        return NewRequest(
            id=name,
            owner=owner,
            deployment="tiny",
            model_key="key",
            compress=False,
            env={},
            blob_bytes=1,
            blob_sha256="0" * 64,
            limits=Limits(),
            accepted_at=self.clock.wall(),
            expires_at=self.clock.wall() + 1e6,
        )

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 7))
    def cancel(self, which: int) -> None:
        name = self.requests[which % len(self.requests)]
        if self.store.get(name) is not None:
            self.cancelled.add(name)
            self.run(lambda: self.relay.core.broker.cancel(name, by="ada"))

    # -- workers

    def worker(self, slot: int) -> FakeWorker | None:
        """The worker that lives there now, if any."""
        worker = self.workers.get(slot)
        return worker if worker is not None and worker.left is None else None

    @rule(slot=st.sampled_from(SLOTS))
    def boot(self, slot: int) -> None:
        """The pilot starts the worker's process, after it died or left."""
        if self.worker(slot) is not None:
            return
        self.boots += 1
        worker = self.workers[slot] = FakeWorker(
            key=self.keys[slot], nonce=f"boot{self.boots}", network=self.network, clock=self.clock
        )
        worker.boot()

    @rule(slot=st.sampled_from(SLOTS), calm=CALM)
    def warm(self, slot: int, *, calm: bool) -> None:
        worker = self.worker(slot)
        if worker is not None and worker.session.state == "loading":
            worker.do(worker.session.warm(executors=1, facts={}))
            if calm:
                self.exchange()

    @rule(
        slot=st.sampled_from(SLOTS),
        what=st.sampled_from(["begin", "begin", "ok", "ok", "user", "crash", "reap"]),
        calm=CALM,
    )
    def work(self, slot: int, what: str, *, calm: bool) -> None:
        """Its executors begin, end one way or another, or are gone after a kill."""
        worker = self.worker(slot)
        if worker is None:
            return
        self.faults |= what == "crash" and worker.running is not None
        match what:
            case "begin":
                self.start(worker)
            case "reap":
                worker.reap()
            case _:
                worker.finish(what)
        if calm:
            self.exchange()

    def start(self, worker: FakeWorker) -> None:
        lease = worker.begin()
        if lease is not None:
            self.note_begin(lease)

    def note_begin(self, lease: tuple[str, int]) -> None:
        request, attempt = lease
        assert lease not in self.begun, "one attempt was executed twice"
        earlier = [each for name, each in self.begun if name == request]
        for each in earlier:
            ended = self.store.attempts(request)[each - 1].end
            assert ended in LOST, f"attempt {attempt} began although attempt {each} ended {ended}"
        self.begun.append(lease)
        assert self.faults or not earlier, "executed twice although nothing went wrong"

    @rule(slot=st.sampled_from(SLOTS), over=st.booleans())
    def signal(self, slot: int, *, over: bool) -> None:
        """The walltime ends, or is over."""
        worker = self.worker(slot)
        if worker is None:
            return
        if over:
            self.faults = True
            worker.do(worker.session.cut_short("SIGUSR1", LeaseEnd.WALLTIME))
        else:
            worker.do(worker.session.drain("SIGUSR2"))

    @rule(slot=st.sampled_from(SLOTS), reported=st.sampled_from(["", "now", "wrongly"]))
    def die(self, slot: int, reported: str) -> None:
        """SIGKILL. The pilot tells it, or not; or an old report comes late."""
        worker = self.worker(slot)
        if reported == "wrongly":
            self.report(slot, "boot0")
        elif worker is not None:
            self.faults = True
            del self.workers[slot]
            self.network.dial(self.keys[slot], lost=0)
            if reported:
                self.report(slot, worker.nonce)

    def report(self, slot: int, nonce: str) -> None:
        key = self.keys[slot].replace("worker", "pilots")
        link = self.network.newest.get(key) or self.network.dial(key)
        link.up.append(codec.encode(m.Hello(versions=[1], nonce="p")))
        link.up.append(codec.encode(m.Report(event="worker_exited", detail="9", nonce=nonce)))

    # -- the operator

    @rule(slot=st.sampled_from(SLOTS))
    def order_drain(self, slot: int) -> None:
        self.run(lambda: self.relay.core.fleet.drain(None, self.allocations[slot]))

    # -- the network

    @precondition(lambda self: self.network.waiting())
    @rule(which=st.integers(0, 9), count=st.integers(1, 4))
    def deliver(self, which: int, count: int) -> None:
        """The relay's socket wakes up: some messages of one connection, old or new."""
        links = self.network.waiting()
        link = links[which % len(links)]
        batch = [link.up.popleft() for _ in range(min(count, len(link.up)))]
        self.hand_over([Incoming(route=link.route, key=link.key, frame=each) for each in batch])

    def hand_over(self, batch: list[Incoming]) -> None:
        self.run(lambda: self.relay.core.gateway.received(batch))

    @rule(slot=st.sampled_from(SLOTS), count=st.integers(1, 4))
    def hear(self, slot: int, count: int) -> None:
        worker = self.worker(slot)
        if worker is not None:
            worker.hear(count)

    @rule()
    def exchange(self) -> None:
        """A calm moment: everything arrives."""
        for _ in range(6):
            for link in list(self.network.waiting()):
                batch = [Incoming(route=link.route, key=link.key, frame=each) for each in link.up]
                link.up.clear()
                self.hand_over(batch)
            self.network.old.clear()
            for worker in self.workers.values():
                worker.hear(100)

    @rule(slot=st.sampled_from(SLOTS), lost=st.integers(0, 3))
    def cut(self, slot: int, lost: int) -> None:
        """The connection breaks; libzmq dials again, the session does not know."""
        self.faults = True
        self.network.redial(self.keys[slot], lost=lost)

    @rule(slot=st.sampled_from(SLOTS), lost=st.integers(0, 3))
    def reconnect(self, slot: int, lost: int) -> None:
        """The worker gives a connection up; some of what it sent there arrives late."""
        worker = self.worker(slot)
        if worker is not None:
            self.faults = True
            self.network.dial(worker.key, lost=lost)
            worker.do(worker.session.connected(self.clock.monotonic()))

    # -- time

    @rule(steps=st.sampled_from([1, 2, 4, 14]), talking=st.booleans())
    def advance(self, steps: int, *, talking: bool) -> None:
        self.faults |= not talking and steps > 2
        for _ in range(steps):
            self.clock.advance(STEP_S)
            self.tick()
            if talking:
                self.exchange()
            self.run(self.relay.core.scheduler.beat)

    @rule()
    def stall(self) -> None:
        """The relay stands still for three lease lengths, everything else goes on."""
        for _ in range(int(3 * LEASE_S / STEP_S)):
            self.clock.advance(STEP_S)
            self.tick()
        self.run(self.relay.core.scheduler.beat)

    def tick(self) -> None:
        for worker in self.workers.values():
            if worker.left is None:
                worker.do(worker.session.tick(self.clock.monotonic()))

    # -- the relay's process and disk

    @rule()
    def hold_commits(self) -> None:
        """A slow disk: what is submitted from now on waits."""
        self.relay.writer.hold()

    @rule(failing=st.booleans())
    def commit(self, *, failing: bool) -> None:
        self.faults |= failing and self.relay.writer.waiting > 0
        self.run(lambda: self.relay.writer.commit(failing=failing))
        self.run(self.relay.writer.release)

    @rule(lost=st.integers(0, 3), orderly=st.booleans())
    def restart_relay(self, lost: int, *, orderly: bool) -> None:
        """SIGTERM or SIGKILL; connections break, and stay unknown until the next Hello."""
        self.faults = True
        if orderly:
            self.run(self.relay.writer.stop)
        self.relay.writer.crash()
        for task in [*self.pending, *self.relay.core.board._tasks]:
            task.cancel()
        self.pending.clear()
        self.run(lambda: None)
        for key in list(self.network.newest):
            self.network.redial(key, lost=lost)
        self.network.old.clear()
        self.relay = self.run(lambda: FakeRelay(self.store, self.clock, self.network))

    # -- what must hold

    @invariant()
    def at_most_one_lease_lives(self) -> None:
        for request in self.store.requests():
            live = [each for each in self.store.attempts(request.id) if each.ended_at is None]
            assert len(live) <= 1
            assert request.holder == (live[0].holder if live else None)

    @invariant()
    def one_end_one_charge(self) -> None:
        ended = sorted(each.id for each in self.store.requests() if each.terminal)
        assert sorted(each.request_id for each in self.store.charges()) == ended

    @invariant()
    def the_board_is_the_image_of_the_rows(self) -> None:
        if not hasattr(self, "relay") or self.relay.writer.waiting:
            return
        board = self.relay.core.board
        rows = {each.id: each for each in self.store.open_requests()}
        assert board.open.keys() == rows.keys()
        for name, entry in board.open.items():
            assert not entry.busy
            assert entry.request.holder == rows[name].holder
            assert entry.request.attempt == rows[name].attempt
            queued = rows[name].state is RequestState.QUEUED
            assert (name in board.queues["tiny"] if "tiny" in board.queues else False) == queued
            assert queued or name in self.relay.core.leasing._leases._deadlines
        for name in self.relay.sessions:
            assert self.relay.ends_told(name) == (
                name not in rows and self.store.get(name) is not None
            )

    @invariant()
    def a_worker_that_left_holds_nothing(self) -> None:
        for worker in self.workers.values():
            if worker.left is not None:
                assert worker.session.held == 0
                assert worker.running is None
                assert not worker.waiting

    # -- the end

    def teardown(self) -> None:
        if not hasattr(self, "relay"):
            return
        self.recover()
        self.check_ends()
        self.run(self.relay.writer.stop)
        self.loop.faults.close()
        self.loop.close()
        self.store.close()

    def recover(self) -> None:
        """The faults stop: disks, networks and workers are well again."""
        self.run(self.relay.writer.release)
        fresh = 2
        self.join(fresh)
        self.boot(fresh)
        for _ in range(ROUNDS_TO_RECOVER):
            self.clock.advance(STEP_S)
            self.tick()
            self.exchange()
            for slot, worker in self.workers.items():
                if worker.left is None:
                    self.warm(slot, calm=False)
                    worker.reap()
                    self.start(worker)
                    worker.finish("ok")
            self.exchange()
            self.run(self.relay.core.scheduler.beat)
            if not self.store.open_requests() and self.nothing_held():
                break

    def nothing_held(self) -> bool:
        return not any(
            each.session.held or each.session._owed for each in self.workers.values()
        ) and not any(each.leases for each in self.relay.core.fleet.workers.values())

    def check_ends(self) -> None:
        assert not self.store.open_requests(), "lost"
        for request in self.store.requests():
            assert self.is_honest(request), request
        core = self.relay.core
        assert not core.board.open
        assert not any(core.board.queues.values())
        held = {key: each.leases for key, each in core.fleet.workers.items() if each.leases}
        assert not held, "seats that nobody sits on"
        self.run(core.scheduler.beat)
        assert len(core.leasing._leases) == 0, "deadlines of leases that ended"
        for worker in self.workers.values():
            assert worker.session.held == 0
            assert worker.running is None
            assert not worker.waiting

    def is_honest(self, request: Request) -> bool:
        if request.state is RequestState.COMPLETED:
            return self.store.inline_result(request.id) == result_of(request.id)
        failure = request.failure
        if failure is None:
            return False
        match failure.kind:
            case FailureKind.CANCELLED:
                return request.id in self.cancelled
            case FailureKind.USER:
                return failure.message == "ZeroDivisionError"
            case FailureKind.CRASH:
                killed = [each.end for each in self.store.attempts(request.id)]
                return request.crashes >= 3 or killed.count("worker_lost") >= 2
        return False


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(
    max_examples=int(os.environ.get("MODEL_EXAMPLES", "150")),
    stateful_step_count=60,
    deadline=None,
)


def test_roles_are_as_joined() -> None:
    """The machine's peers are real ones: a worker's key has the worker's role."""
    machine = SessionMachine()
    try:
        machine.begin()
        peer = machine.relay.core.fleet.peer(machine.keys[0])
        assert peer is not None
        assert peer.role is PeerRole.WORKER
        machine.accept("ada", 1, calm=True)
        machine.work(0, "begin", calm=True)
        machine.work(1, "begin", calm=True)
        assert len(machine.begun) == 1
    finally:
        machine.teardown()


pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
