"""The writer with its thread, and the stand-in that commits when a test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from edif_hpc.domain.deployment import Deployment
from edif_hpc.errors import Conflict, StoreUnavailable
from edif_hpc.failpoints import Action, Armed, FailpointReached, Failpoints
from edif_hpc.store.base import Store
from edif_hpc.store.memory import MemoryStore
from edif_hpc.store.writer import Op, Writer
from edif_hpc.testing.writer import SteppedWriter

Make = Callable[..., Writer]


class Counting(MemoryStore):
    """Counts its commits."""

    commits = 0

    def _commit(self) -> None:
        super()._commit()
        self.commits += 1


@pytest.fixture
def store() -> Iterator[Counting]:
    store = Counting()
    store.open()
    yield store
    store.close()


@pytest.fixture(params=[Writer, SteppedWriter])
def make(request: pytest.FixtureRequest) -> Make:
    made: Make = request.param
    return made


def add(name: str) -> Op[str]:
    def op(store: Store) -> str:
        store.add_deployment(Deployment(name=name, repo_id="a/b", revision=None, task="t"))
        return name

    return op


def names(store: Store) -> list[str]:
    return [each.name for each in store.deployments()]


async def test_what_one_iteration_of_the_loop_submits_is_one_group(
    make: Make, store: Counting
) -> None:
    async with make(store) as writer:
        future = writer.submit(add("a"))
        lazy = writer.submit(add("b"), lazy=True)
        last = writer.submit(names)
        assert not future.done(), "nothing is told before the commit"
        assert await last == ["a", "b"]
        assert future.done()
        assert lazy.done()
        assert store.commits == 1
        assert await writer.submit(names) == ["a", "b"]
        assert store.commits == 2


async def test_what_follows_from_an_answer_is_the_next_group(make: Make, store: Counting) -> None:
    followed: list[asyncio.Future[str]] = []
    async with make(store) as writer:
        first = writer.submit(add("a"))
        first.add_done_callback(lambda _: followed.append(writer.submit(add("b"))))
        await first
        assert await followed[0] == "b"
    assert store.commits == 2


async def test_refusals_and_order(make: Make, store: Counting) -> None:
    async with make(store) as writer:
        found = await asyncio.gather(
            *writer.submit_many([add("a"), add("a"), names]), return_exceptions=True
        )
        assert [type(each) for each in found] == [str, Conflict, list]
        assert found[2] == ["a"]


async def test_a_lost_store_fails_the_whole_group(make: Make, store: Counting) -> None:
    def lost(store: Store) -> None:
        raise StoreUnavailable("disk I/O error")

    async with make(store) as writer:
        found = await asyncio.gather(*writer.submit_many([add("a"), lost]), return_exceptions=True)
        assert [type(each) for each in found] == [StoreUnavailable] * 2
        assert names(store) == []
        assert await writer.submit(add("b")) == "b"


async def test_an_unforeseen_fault_ends_it(make: Make) -> None:
    failpoints = Failpoints({"store.commit.before": Armed(action=Action.RAISE, nth=1)})
    store = MemoryStore(failpoints)
    store.open()
    writer = make(store, failpoints)
    writer.start()
    with pytest.raises(StoreUnavailable, match="restart the relay"):
        await writer.submit(add("a"))
    assert isinstance(await writer.died, FailpointReached)
    with pytest.raises(StoreUnavailable):
        await writer.submit(add("b"))
    await writer.stop()
    store.close()


async def test_stop_commits_what_waits(make: Make, store: Counting) -> None:
    writer = make(store)
    writer.start()
    future = writer.submit(add("a"), lazy=True)
    await writer.stop()
    await writer.stop()
    assert await future == "a"
    with pytest.raises(StoreUnavailable, match="has stopped"):
        await writer.submit(add("b"))


# -- what only the stand-in does -----------------------------------------------------------------


async def test_a_held_group_waits_for_the_test(store: Counting) -> None:
    async with SteppedWriter(store) as writer:
        writer.hold()
        futures = writer.submit_many([add("a"), add("b")])
        await asyncio.sleep(0)
        futures.append(writer.submit(add("c")))
        await asyncio.sleep(0)
        assert not any(each.done() for each in futures)
        assert writer.waiting == 3
        writer.commit()
        assert [each.result() for each in futures] == ["a", "b", "c"]
        assert (store.commits, writer.groups, writer.waiting) == (1, 1, 0)
        writer.commit()
        assert writer.groups == 1


async def test_a_commit_that_fails_on_demand(store: Counting) -> None:
    async with SteppedWriter(store) as writer:
        writer.hold()
        future = writer.submit(add("a"))
        writer.commit(failing=True)
        with pytest.raises(StoreUnavailable, match="disk is full"):
            await future
        again = writer.submit(add("a"))
        writer.release()
        assert await again == "a"


async def test_a_crash_tells_nobody(store: Counting) -> None:
    writer = SteppedWriter(store)
    writer.start()
    future = writer.submit(add("a"))
    writer.crash()
    await asyncio.sleep(0)
    assert not future.done()
    assert names(store) == []
    with pytest.raises(StoreUnavailable, match="gone"):
        await writer.submit(add("b"))
