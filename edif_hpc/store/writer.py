"""The one thread that changes the store, for callers on an event loop.

A commit costs one sync of the disk, whatever is in it. So everything that is waiting when the
thread is free becomes one group: a transaction in which each operation has its own savepoint, then
one commit. What one iteration of the loop submits is handed over together, so a cause and what
follows from it at once (a DONE and the next grant) share a group. Under load the groups grow by
themselves and the cost per operation shrinks.

A future is resolved after the commit of its group, never before: what a caller sees is on the
disk. An operation's own exception goes to its own future and undoes that operation alone. If the
commit fails, all futures of the group fail with `StoreUnavailable` and nothing of it has happened;
the next group is tried again. Any other fault means that the state of the store is unknown: the
thread ends, whoever waits is told, and `died` gives the fault to the owner, who ends the process.

A *lazy* operation does not wake the thread. It rides with the next group, at most 50 ms later.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, TypeVar

from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.store.base import Store

LAZY_S: Final = 0.05

T = TypeVar("T")
Op = Callable[[Store], T]


@dataclass(frozen=True, slots=True)
class Job:
    """An operation, and who waits for its answer."""

    op: Op[Any]
    future: asyncio.Future[Any]


@dataclass(frozen=True, slots=True)
class _Outcome:
    job: Job
    value: Any = None
    error: Exception | None = None

    def tell(self) -> None:
        if self.job.future.done():  # its caller was cancelled and does not wait any more
            return
        if self.error is None:
            self.job.future.set_result(self.value)
        else:
            self.job.future.set_exception(self.error)


class Writer:
    """Runs operations on an open store in groups. Used from one event loop.

    Call `start` on the loop, `submit` from it, and `stop` at the end; `run` needs neither.
    """

    def __init__(self, store: Store, failpoints: Failpoints | None = None) -> None:
        self._store = store
        self._failpoints = failpoints or Failpoints()
        self._groups: queue.SimpleQueue[list[Job] | None] = queue.SimpleQueue()
        self._waiting: list[Job] = []
        self._flushing: asyncio.Handle | None = None  # when the waiting jobs are handed over
        self._lazily = False  # that this is a timer's, for none of them is urgent
        self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Future[None] | None = None
        self._died: asyncio.Future[BaseException] | None = None
        self._refusal: StoreUnavailable | None = None

    # -- life ------------------------------------------------------------------------------------
    def start(self) -> None:
        """Start the thread; the running loop is the one that it answers to."""
        self._loop = asyncio.get_running_loop()
        self._ended = self._loop.create_future()
        self._died = self._loop.create_future()
        self._thread.start()

    async def stop(self) -> None:
        """Commit what is waiting, and end the thread. A second stop does nothing."""
        if self._ended is None:
            return
        if self._refusal is None:
            self._flush()
            self._refusal = StoreUnavailable("the store's writer has stopped; the relay is ending")
            self._groups.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def died(self) -> asyncio.Future[BaseException]:
        """Resolved with the fault that ended the thread, if ever; its owner has to watch it."""
        if self._died is None:
            raise StoreUnavailable("the store's writer has not been started")
        return self._died

    # -- operations ------------------------------------------------------------------------------
    def submit(self, op: Op[T], *, lazy: bool = False) -> asyncio.Future[T]:
        """Run `op` in the next group; the future has its answer after the commit."""
        job = self._job(op)
        if self._refusal is not None:
            _all_fail([job], self._refusal)[0].tell()
            return job.future
        self._waiting.append(job)
        self._schedule(job.future.get_loop(), lazily=lazy)
        return job.future

    def submit_many(self, ops: Sequence[Op[Any]]) -> list[asyncio.Future[Any]]:
        """Run all of them in the same group, in their order."""
        return [self.submit(op) for op in ops]

    def run(self, op: Op[T]) -> T:
        """Run `op` here and now, in a group of its own: for the start, before there is a loop."""
        with self._store.transaction(), self._store.savepoint():
            return op(self._store)

    def _job(self, op: Op[Any]) -> Job:
        if self._loop is None:
            raise StoreUnavailable("the store's writer has not been started")
        return Job(op, self._loop.create_future())

    def _schedule(self, loop: asyncio.AbstractEventLoop, *, lazily: bool) -> None:
        if self._flushing is not None:
            if lazily or not self._lazily:
                return  # it is early enough
            self._flushing.cancel()
        self._lazily = lazily
        self._flushing = (
            loop.call_later(LAZY_S, self._flush) if lazily else loop.call_soon(self._flush)
        )

    def _flush(self) -> None:
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        group, self._waiting = self._waiting, []
        if group:
            self._groups.put(group)

    # -- in the thread ---------------------------------------------------------------------------
    def _main(self) -> None:
        group: list[Job] = []
        try:
            while group := self._next_group():
                self._tell(self._commit(group))
        except BaseException as fault:  # noqa: BLE001 - the thread's edge: the owner must know
            self._call(self._bury, fault, group)
        else:
            self._call(self._finish)

    def _next_group(self) -> list[Job]:
        """Everything that is waiting; empty when there will be no more."""
        group: list[Job] = []
        more = self._groups.get()
        while more is not None:
            group += more
            if self._groups.empty():
                return group
            more = self._groups.get()
        if group:
            self._groups.put(None)  # the end is seen again after this group
        return group

    def _commit(self, group: list[Job]) -> list[_Outcome]:
        try:
            with self._store.transaction():
                return [self._attempt(job) for job in group]
        except StoreUnavailable as failure:
            return _all_fail(group, failure)

    def _attempt(self, job: Job) -> _Outcome:
        try:
            with self._store.savepoint():
                value = job.op(self._store)
        except StoreUnavailable:
            raise  # the transaction itself is lost, so the whole group is
        except Exception as error:  # noqa: BLE001 - not swallowed: it is the answer to this caller
            outcome = _Outcome(job, error=error)
        else:
            outcome = _Outcome(job, value)
        self._failpoints.hit("store.op.after")
        return outcome

    def _tell(self, outcomes: list[_Outcome]) -> None:
        self._call(_tell_all, outcomes)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        # A closed loop has nobody left to tell: its process is past `stop`, or was interrupted.
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    # -- back on the loop ------------------------------------------------------------------------
    def _bury(self, fault: BaseException, group: list[Job]) -> None:
        failure = StoreUnavailable(
            f"the store's writer died of {type(fault).__name__}: {fault}; restart the relay"
        )
        failure.__cause__ = fault
        self._refusal = failure
        self._flush()
        while not self._groups.empty():
            group += self._groups.get() or []
        _tell_all(_all_fail(group, failure))
        if self._died is not None:
            self._died.set_result(fault)
        self._finish()

    def _finish(self) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)


def _all_fail(group: list[Job], failure: StoreUnavailable) -> list[_Outcome]:
    # Each caller gets its own exception, because raising adds to an exception's traceback.
    outcomes = []
    for job in group:
        own = StoreUnavailable(failure.message, place=failure.place)
        own.__cause__ = failure
        outcomes.append(_Outcome(job, error=own))
    return outcomes


def _tell_all(outcomes: list[_Outcome]) -> None:
    for outcome in outcomes:
        outcome.tell()
