"""The writer: groups, isolation, laziness, and what callers hear when something fails."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest

from edif_hpc.domain.deployment import Deployment
from edif_hpc.errors import Conflict, NotFound, StoreUnavailable
from edif_hpc.failpoints import Action, Armed, FailpointReached, Failpoints
from edif_hpc.store.base import Store
from edif_hpc.store.memory import MemoryStore
from edif_hpc.store.writer import LAZY_S, Op, Writer

WAIT_S = 10.0


class CountingStore(MemoryStore):
    """Counts its commits, and can be held up or made to fail at them."""

    def __init__(self) -> None:
        super().__init__()
        self.commits = 0
        self.fails = False
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()

    def _commit(self) -> None:
        self.at_gate.set()
        if not self.gate.wait(WAIT_S):
            raise TimeoutError("nobody opened the gate")
        if self.fails:
            raise StoreUnavailable("the disk is full")
        super()._commit()
        self.commits += 1

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """Keep commits from happening meanwhile."""
        self.gate.clear()
        self.at_gate.clear()
        try:
            yield
        finally:
            self.gate.set()

    async def until_held(self) -> None:
        assert await asyncio.to_thread(self.at_gate.wait, WAIT_S)


@pytest.fixture
def store() -> Iterator[CountingStore]:
    store = CountingStore()
    store.open()
    yield store
    store.close()


@pytest.fixture
async def writer(store: CountingStore) -> AsyncIterator[Writer]:
    async with Writer(store) as writer:
        yield writer


def add(name: str) -> Op[str]:
    def op(store: Store) -> str:
        deployment = Deployment(name=name, repo_id="a/b", revision=None, task="t")
        store.add_deployment(deployment)
        return name

    return op


def names(store: Store) -> list[str]:
    return [each.name for each in store.deployments()]


async def test_an_answer_comes_after_the_commit(writer: Writer, store: CountingStore) -> None:
    with store.held_up():
        future = writer.submit(add("a"))
        await store.until_held()
        assert not future.done()
        assert names(store) == []
    assert await future == "a"
    assert names(store) == ["a"]


async def test_what_waits_becomes_one_group(writer: Writer, store: CountingStore) -> None:
    with store.held_up():
        first = writer.submit(add("first"))
        await store.until_held()
        waiting = [writer.submit(add(f"n{number}")) for number in range(20)]
    await first
    await asyncio.gather(*waiting)
    assert store.commits == 2


async def test_submit_many_is_one_group_in_its_order(writer: Writer, store: CountingStore) -> None:
    futures = writer.submit_many([add("a"), names, add("b"), names])
    assert await asyncio.gather(*futures) == ["a", ["a"], "b", ["a", "b"]]
    assert store.commits == 1
    assert writer.submit_many([]) == []


async def test_a_refusal_is_told_to_its_caller_alone(writer: Writer, store: Store) -> None:
    outcomes = await asyncio.gather(
        *writer.submit_many([add("a"), add("a"), lambda s: s.remove_deployment("x"), add("b")]),
        return_exceptions=True,
    )
    assert [type(each) for each in outcomes] == [str, Conflict, NotFound, str]
    assert names(store) == ["a", "b"]


async def test_an_operation_that_fails_half_way_is_undone(writer: Writer, store: Store) -> None:
    def half(store: Store) -> None:
        add("half")(store)
        raise KeyError("a mistake of the caller")

    with pytest.raises(KeyError):
        await writer.submit(half)
    assert names(store) == []
    assert await writer.submit(add("a")) == "a"


async def test_a_failed_commit_fails_its_group_and_no_other(
    writer: Writer, store: CountingStore
) -> None:
    store.fails = True
    outcomes = await asyncio.gather(
        *writer.submit_many([add("a"), add("a"), add("b")]), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [StoreUnavailable] * 3
    assert len({id(each) for each in outcomes}) == 3
    assert "disk is full" in str(outcomes[0])
    assert names(store) == []
    store.fails = False
    assert await writer.submit(add("a")) == "a"
    assert not writer.died.done()


async def test_an_operation_that_loses_the_store_fails_its_group(
    writer: Writer, store: Store
) -> None:
    def lost(store: Store) -> None:
        raise StoreUnavailable("disk I/O error")

    outcomes = await asyncio.gather(
        *writer.submit_many([add("a"), lost, add("b")]), return_exceptions=True
    )
    assert [type(each) for each in outcomes] == [StoreUnavailable] * 3
    assert names(store) == []


async def test_a_caller_that_was_cancelled_disturbs_nobody(
    writer: Writer, store: CountingStore
) -> None:
    with store.held_up():
        gone, stays = writer.submit_many([add("a"), add("b")])
        await store.until_held()
        gone.cancel()
    assert await stays == "b"
    assert names(store) == ["a", "b"]


async def test_a_lazy_operation_rides_with_the_next_group_in_its_order(
    writer: Writer, store: CountingStore
) -> None:
    lazy = writer.submit(add("a"), lazy=True)
    assert await writer.submit(names) == ["a"]
    assert await lazy == "a"
    assert store.commits == 1


async def test_a_lazy_operation_does_not_wait_for_ever(
    writer: Writer, store: CountingStore
) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    futures = [writer.submit(add(name), lazy=True) for name in "abc"]
    await asyncio.gather(*futures)
    assert loop.time() - began >= LAZY_S
    assert store.commits == 1


async def test_stop_commits_what_waits(store: CountingStore) -> None:
    writer = Writer(store)
    writer.start()
    with store.held_up():
        futures = [writer.submit(add("a"))]
        await store.until_held()
        futures += [writer.submit(add("b")), writer.submit(add("c"), lazy=True)]
        stopping = asyncio.create_task(writer.stop())
    await stopping
    assert [future.result() for future in futures] == ["a", "b", "c"]
    await writer.stop()
    with pytest.raises(StoreUnavailable, match="has stopped"):
        await writer.submit(add("d"))


async def test_stop_alone_and_before_the_start(store: Store) -> None:
    await Writer(store).stop()
    async with Writer(store) as writer:
        pass
    assert not writer.died.done()


async def test_the_writer_has_to_be_started(store: Store) -> None:
    with pytest.raises(StoreUnavailable, match="has not been started"):
        Writer(store).submit(add("a"))
    with pytest.raises(StoreUnavailable, match="has not been started"):
        _ = Writer(store).died


async def test_run_works_without_the_thread_and_beside_it(
    writer: Writer, store: CountingStore
) -> None:
    assert Writer(store).run(add("a")) == "a"
    assert await asyncio.gather(
        asyncio.to_thread(writer.run, add("b")), writer.submit(add("c"))
    ) == ["b", "c"]
    with pytest.raises(Conflict):
        writer.run(add("a"))
    assert names(store) == ["a", "b", "c"]


@pytest.mark.parametrize("place", ["store.op.after", "store.commit.before", "store.commit.after"])
async def test_an_unforeseen_fault_ends_the_writer_and_everybody_hears(place: str) -> None:
    failpoints = Failpoints({place: Armed(action=Action.RAISE, nth=2)})
    store = MemoryStore(failpoints)
    store.open()
    writer = Writer(store, failpoints)
    writer.start()
    assert await writer.submit(add("a")) == "a"
    lazy = writer.submit(add("c"), lazy=True)
    outcomes = await asyncio.gather(writer.submit(add("b")), lazy, return_exceptions=True)
    assert isinstance(await writer.died, FailpointReached)
    for outcome in outcomes:
        assert isinstance(outcome, StoreUnavailable)
        assert place in str(outcome)
    with pytest.raises(StoreUnavailable, match="restart the relay"):
        await writer.submit(add("d"))
    await writer.stop()
    assert names(store) == (["a", "b", "c"] if place == "store.commit.after" else ["a"])
    store.close()


async def test_those_who_wait_behind_a_fault_hear_too(store: CountingStore) -> None:
    class Fault(BaseException):
        pass

    entered, go_on = threading.Event(), threading.Event()

    def fault(store: Store) -> None:
        entered.set()
        go_on.wait(WAIT_S)
        raise Fault

    writer = Writer(store)
    writer.start()
    doomed = writer.submit(fault)
    assert await asyncio.to_thread(entered.wait, WAIT_S)
    behind = [writer.submit(add("b")), writer.submit(add("c"), lazy=True)]
    go_on.set()
    async with asyncio.timeout(WAIT_S):
        outcomes = await asyncio.gather(doomed, *behind, return_exceptions=True)
    assert [type(each) for each in outcomes] == [StoreUnavailable] * 3
    assert isinstance(await writer.died, Fault)
    await writer.stop()
    assert names(store) == []


async def test_a_writer_whose_loop_is_gone_ends_quietly(store: CountingStore) -> None:
    def other_loop() -> Writer:
        async def start() -> Writer:
            writer = Writer(store)
            writer.start()
            return writer

        return asyncio.run(start())

    writer = await asyncio.to_thread(other_loop)
    writer._groups.put(None)
    await asyncio.to_thread(writer._thread.join, WAIT_S)
    assert not writer._thread.is_alive()
    del writer
    gc.collect()
