"""The queue under any order of events: brokers, workers that were thought dead, crashes, restarts.

A Hypothesis machine sends leases, starts, answers, losses, steals and cancellations, by holders
that may be stale, to a store, and the same to `Spec`, which says in plain Python what should come
of them. Operations gather in one open transaction, which at any moment may be committed, may fail
just before or just after the commit, or may be lost with the process: SQLite then continues from
the files as a SIGKILL would have left them. What was not committed must be gone, what was
committed must be there, and the invariants must hold at every step.

`MODEL_EXAMPLES=5000 pytest -o faulthandler_timeout=0 tests/model` looks deeper.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)

from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.request import (
    Failure,
    FailureKind,
    Limits,
    NewRequest,
    Request,
    RequestState,
    ResultRef,
)
from edif_hpc.errors import (
    Conflict,
    EdifError,
    NotFound,
    StaleAttempt,
    StoreUnavailable,
    TransitionRefused,
)
from edif_hpc.failpoints import FailpointReached, Failpoints
from edif_hpc.store.base import Store
from edif_hpc.store.memory import MemoryStore
from edif_hpc.store.sqlite import SqliteStore

QUEUED, DISPATCHED, RUNNING = RequestState.QUEUED, RequestState.DISPATCHED, RequestState.RUNNING
COMPLETED, ERROR = RequestState.COMPLETED, RequestState.ERROR
SPENDING = {LeaseEnd.EXECUTOR_CRASH, LeaseEnd.OOM, LeaseEnd.WORKER_LOST, LeaseEnd.UNKNOWN}

REQUESTS = st.sampled_from(["r1", "r2", "r3"])
HOLDERS = st.sampled_from(["w1", "w2"])


class Killed(BaseException):
    """The process is gone in the middle of a transaction."""


class Faults(Failpoints):
    """Failpoints that the machine arms as it goes."""

    armed: str | None = None

    def hit(self, name: str) -> None:
        if name == self.armed:
            self.armed = None
            raise FailpointReached(name)


# -- the specification ---------------------------------------------------------------------------


@dataclass
class Entry:
    """What should be true of one request."""

    state: RequestState = QUEUED
    leases: list[tuple[str, str | None]] = field(default_factory=list)  # (holder, end)
    crashes: int = 0
    result: bytes | None = None
    kind: FailureKind | None = None


@dataclass
class Spec:
    """What should come of each operation: it changes an entry, or gives the error's class."""

    entries: dict[str, Entry] = field(default_factory=dict)

    def accept(self, request_id: str) -> type[EdifError] | None:
        if request_id in self.entries:
            return Conflict
        self.entries[request_id] = Entry()
        return None

    def lease(self, request_id: str, holder: str) -> type[EdifError] | None:
        entry = self.entries.get(request_id)
        if entry is None:
            return NotFound
        if entry.state is not QUEUED:
            return TransitionRefused
        entry.state = DISPATCHED
        entry.leases.append((holder, None))
        return None

    def write(
        self, lease: tuple[str, int, str], end: str, then: Callable[[Entry], Any]
    ) -> type[EdifError] | None:
        """A write by a worker: only the newest lease may, if it is open or said the same."""
        request_id, attempt, holder = lease
        entry = self.entries.get(request_id)
        if entry is None:
            return NotFound
        if attempt != len(entry.leases) or entry.leases[-1][0] != holder:
            return StaleAttempt
        if entry.leases[-1][1] is not None:
            repeated = entry.leases[-1][1] == end and end in {"completed", "error"}
            return None if repeated else StaleAttempt
        refusal: type[EdifError] | None = then(entry)
        return refusal

    def start(self, lease: tuple[str, int, str]) -> type[EdifError] | None:
        return self.write(lease, "", lambda entry: setattr(entry, "state", RUNNING))

    def release(self, lease: tuple[str, int, str], end: LeaseEnd) -> type[EdifError] | None:
        def then(entry: Entry) -> type[EdifError] | None:
            if end is LeaseEnd.STOLEN and entry.state is RUNNING:
                return TransitionRefused
            entry.leases[-1] = (entry.leases[-1][0], str(end))
            entry.crashes += end in SPENDING
            lost = sum(cause == LeaseEnd.WORKER_LOST for _, cause in entry.leases)
            if lost >= 2 or entry.crashes >= 3:
                entry.state = ERROR
                oom = end is LeaseEnd.OOM and lost < 2
                entry.kind = FailureKind.OOM if oom else FailureKind.CRASH
            else:
                entry.state = QUEUED
            return None

        return self.write(lease, "", then)

    def complete(self, lease: tuple[str, int, str], result: bytes) -> type[EdifError] | None:
        def then(entry: Entry) -> None:
            entry.state, entry.result = COMPLETED, result
            entry.leases[-1] = (entry.leases[-1][0], "completed")

        return self.write(lease, "completed", then)

    def fail(self, lease: tuple[str, int, str]) -> type[EdifError] | None:
        def then(entry: Entry) -> None:
            entry.state, entry.kind = ERROR, FailureKind.USER
            entry.leases[-1] = (entry.leases[-1][0], "error")

        return self.write(lease, "error", then)

    def end(self, request_id: str) -> type[EdifError] | None:
        entry = self.entries.get(request_id)
        if entry is None:
            return NotFound
        if entry.state in {COMPLETED, ERROR}:
            return TransitionRefused
        if entry.state is not QUEUED:
            entry.leases[-1] = (entry.leases[-1][0], "cancelled")
        entry.state, entry.kind = ERROR, FailureKind.CANCELLED
        return None

    def forget(self, request_id: str) -> type[EdifError] | None:
        entry = self.entries.get(request_id)
        if entry is None:
            return NotFound
        if entry.state is not COMPLETED:
            return TransitionRefused
        entry.result = None
        return None


# -- the machine ---------------------------------------------------------------------------------


class QueueMachine(RuleBasedStateMachine):
    """Runs operations on a store and on the specification, and compares."""

    def __init__(self) -> None:
        super().__init__()
        self.faults = Faults()
        self.committed = Spec()
        self.draft = Spec()
        self.open_transaction: AbstractContextManager[None] | None = None
        self.now = 100.0
        self.terminal: dict[str, Request] = {}  # as each was when its end was first committed
        self.seen_attempts: dict[str, int] = {}
        self.store = self.make()

    leases = Bundle("leases")

    def make(self) -> Store:
        """A store, open."""
        raise NotImplementedError

    def kill(self) -> None:
        """Continue with a store that has what a killed process would have left."""
        raise NotImplementedError

    # -- one operation ---------------------------------------------------------------------------
    def expect(self, expected: type[EdifError] | None, op: Callable[[], Any]) -> None:
        """Run `op` in the open transaction, and compare what comes of it."""
        self.now += 1.0
        if self.open_transaction is None:
            self.open_transaction = self.store.transaction()
            self.open_transaction.__enter__()
        observed: type[EdifError] | None = None
        try:
            with self.store.savepoint():
                op()
        except EdifError as error:
            observed = type(error)
        assert observed is expected, f"expected {expected}, observed {observed}"

    @initialize()
    def begin_with_a_request(self) -> None:
        self.accept("r1")
        self.commit()

    @rule(request_id=REQUESTS)
    def accept(self, request_id: str) -> None:
        new = NewRequest(
            id=request_id,
            owner="ada",
            deployment="tiny",
            model_key="key",
            compress=False,
            env={},
            blob_bytes=4,
            blob_sha256="0" * 64,
            limits=Limits(),
            accepted_at=self.now,
            expires_at=self.now + 1000,
        )
        self.expect(self.draft.accept(request_id), lambda: self.store.accept(new, b"blob"))

    @rule(target=leases, request_id=REQUESTS, holder=HOLDERS)
    def lease(self, request_id: str, holder: str) -> Any:
        """A broker grants; the lease may be undone or stale when its worker writes."""
        refusal = self.draft.lease(request_id, holder)
        self.expect(refusal, lambda: self.store.lease(request_id, holder, self.now))
        if refusal is not None:
            return multiple()
        return (request_id, len(self.draft.entries[request_id].leases), holder)

    @rule(lease=leases)
    def start(self, lease: tuple[str, int, str]) -> None:
        self.expect(self.draft.start(lease), lambda: self.store.start(*lease, self.now))

    @rule(lease=leases, end=st.sampled_from(LeaseEnd))
    def lose(self, lease: tuple[str, int, str], end: LeaseEnd) -> None:
        """Expired, stolen, drained, preempted, crashed."""
        self.expect(
            self.draft.release(lease, end),
            lambda: self.store.release(*lease, self.now, end=end, evidence={}),
        )

    @rule(lease=leases)
    def steal(self, lease: tuple[str, int, str]) -> None:
        """An end like others, but for its race with the start: so it is tried more often."""
        self.lose(lease, LeaseEnd.STOLEN)

    @rule(request_id=REQUESTS, holder=HOLDERS)
    def give_up_half_way(self, request_id: str, holder: str) -> None:
        """An operation that fails after it has written: its savepoint takes all of it back."""

        def op() -> None:
            with suppress(EdifError):
                self.store.lease(request_id, holder, self.now)
            raise Conflict

        self.expect(Conflict, op)

    @rule(lease=leases)
    def complete(self, lease: tuple[str, int, str]) -> None:
        result = f"{lease} at {self.now}".encode()  # so a second one would be seen
        ref = ResultRef(size_bytes=len(result), key=None)
        self.expect(
            self.draft.complete(lease, result),
            lambda: self.store.complete(*lease, self.now, result=ref, inline=result, meta={}),
        )

    @rule(lease=leases)
    def fail(self, lease: tuple[str, int, str]) -> None:
        failure = Failure(kind=FailureKind.USER, message="no")
        self.expect(
            self.draft.fail(lease),
            lambda: self.store.fail(*lease, self.now, failure=failure, meta={}),
        )

    @rule(request_id=REQUESTS)
    def cancel(self, request_id: str) -> None:
        failure = Failure(kind=FailureKind.CANCELLED, message="cancelled")
        self.expect(
            self.draft.end(request_id),
            lambda: self.store.end(request_id, self.now, failure=failure),
        )

    @rule(request_id=REQUESTS)
    def forget(self, request_id: str) -> None:
        self.expect(
            self.draft.forget(request_id),
            lambda: self.store.forget_result(request_id, self.now),
        )

    # -- the end of a transaction ----------------------------------------------------------------
    @rule()
    def commit(self) -> None:
        if self.open_transaction is not None:
            self.open_transaction.__exit__(None, None, None)
        self.settle(committed=True)

    @rule(after=st.booleans(), killed=st.booleans())
    def fail_at_the_commit(self, *, after: bool, killed: bool) -> None:
        if self.open_transaction is None:
            return  # nothing to commit
        self.faults.armed = f"store.commit.{'after' if after else 'before'}"
        with suppress(FailpointReached):
            self.open_transaction.__exit__(None, None, None)
        assert self.faults.armed is None, "the failpoint was not hit"
        self.settle(committed=after)
        if killed:
            self.kill()

    @rule()
    def lose_the_process(self) -> None:
        """At any moment: between two operations, or between the last one and the commit."""
        left, self.open_transaction = self.open_transaction, None
        self.kill()
        if left is not None:
            with suppress(Killed, StoreUnavailable):
                left.__exit__(Killed, Killed(), None)
        self.settle(committed=False)

    def settle(self, *, committed: bool) -> None:
        self.open_transaction = None
        if committed:
            self.committed = copy.deepcopy(self.draft)
            self.note_what_is_final()
        else:
            self.draft = copy.deepcopy(self.committed)

    def note_what_is_final(self) -> None:
        for request in self.store.requests():
            if request.terminal:
                self.terminal.setdefault(request.id, request)
            self.seen_attempts[request.id] = request.attempt

    # -- what must hold --------------------------------------------------------------------------
    @invariant()
    def the_store_is_as_specified(self) -> None:
        requests = {each.id: each for each in self.store.requests()}
        assert requests.keys() == self.draft.entries.keys()
        for name, entry in self.draft.entries.items():
            request = requests[name]
            assert request.state is entry.state
            assert request.crashes == entry.crashes
            assert [(a.holder, a.end) for a in self.store.attempts(name)] == entry.leases
            assert self.store.inline_result(name) == entry.result
            assert (request.failure.kind if request.failure else None) == entry.kind
            assert (self.store.blob(name) is None) == request.terminal

    @invariant()
    def at_most_one_lease_lives(self) -> None:
        for request in self.store.requests():
            live = [a for a in self.store.attempts(request.id) if a.ended_at is None]
            leased = request.state in {DISPATCHED, RUNNING}
            assert len(live) == leased
            assert request.holder == (live[0].holder if live else None)

    @invariant()
    def attempts_only_grow(self) -> None:
        for request in self.store.requests():
            numbers = [each.attempt for each in self.store.attempts(request.id)]
            assert numbers == list(range(1, request.attempt + 1))
            assert request.attempt >= self.seen_attempts.get(request.id, 0)

    @invariant()
    def every_accepted_request_is_queued_leased_or_ended(self) -> None:
        requests = self.store.requests()
        assert {each.id for each in requests} >= self.committed.entries.keys()
        waiting = {each.id for each in self.store.open_requests()}
        assert waiting == {each.id for each in requests if not each.terminal}

    @invariant()
    def an_end_is_final_and_charged_once(self) -> None:
        charged = [each.request_id for each in self.store.charges()]
        ended = {each.id: each for each in self.store.requests() if each.terminal}
        assert sorted(charged) == sorted(ended)
        for name, first in self.terminal.items():
            now = ended[name]
            assert (now.state, now.attempt, now.ended_at) == (
                first.state,
                first.attempt,
                first.ended_at,
            )
            assert now.failure == first.failure

    @invariant()
    def a_result_is_that_of_the_newest_attempt(self) -> None:
        for request in self.store.requests():
            result = self.store.inline_result(request.id)
            if result is not None:
                holder = self.store.attempts(request.id)[-1].holder
                said_by = str((request.id, request.attempt, holder))
                assert request.state is COMPLETED
                assert result.decode().startswith(said_by)

    def teardown(self) -> None:
        self.lose_the_process()
        self.the_store_is_as_specified()
        self.store.close()


class MemoryQueue(QueueMachine):
    """On the shipped fake; its rows outlive a `kill`, its open transaction does not."""

    def make(self) -> Store:
        store = MemoryStore(self.faults)
        store.open()
        return store

    def kill(self) -> None:
        self.store.close()
        self.store.open()


class SqliteQueue(QueueMachine):
    """On SQLite; a `kill` continues from a copy of the files as they are at that moment."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.lives: Iterator[Path] = (self.root / f"{n}" for n in range(10_000))
        self.folder = next(self.lives)
        self.folder.mkdir()
        super().__init__()

    def make(self) -> Store:
        store = SqliteStore(self.folder / "queue.sqlite", self.faults)
        store.open()
        return store

    def kill(self) -> None:
        folder = next(self.lives)
        folder.mkdir()
        for name in ["queue.sqlite", "queue.sqlite-wal"]:
            if (self.folder / name).exists():
                shutil.copy(self.folder / name, folder / name)
        self.store.close()
        shutil.rmtree(self.folder)
        self.folder = folder
        self.store = self.make()

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.root)


def depth(usual: int) -> settings:
    return settings(
        max_examples=int(os.environ.get("MODEL_EXAMPLES", usual)),
        stateful_step_count=40,
        deadline=None,
    )


class TestMemoryQueue(MemoryQueue.TestCase):  # type: ignore[misc]
    settings: ClassVar[settings] = depth(300)


class TestSqliteQueue(SqliteQueue.TestCase):  # type: ignore[misc]
    settings: ClassVar[settings] = depth(200)
