"""Who gets which executor, and when. Executors are names here: a line does not look at them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from edif_hpc.testing.wait import wait_until_async
from edif_hpc.worker.engine.line import Line

pytestmark = pytest.mark.anyio

DEADLINE_S = 30.0


class Asked:
    """Counts how often more executors are ordered."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


def seat(name: str) -> Any:
    return name


async def waiting(line: Line, asked: Asked, count: int) -> list[asyncio.Task[Any]]:
    tasks = [asyncio.create_task(line.take(asked)) for _ in range(count)]
    await wait_until_async(lambda: asked.times == count, DEADLINE_S, "all wait")
    return tasks


async def test_who_waits_longest_is_first() -> None:
    line, asked = Line(alone=False), Asked()
    tasks = await waiting(line, asked, 2)
    line.offer(seat("a"))
    line.offer(seat("b"))
    assert await asyncio.gather(*tasks) == ["a", "b"]
    assert not line.held_up


async def test_more_are_ordered_only_when_none_is_left() -> None:
    line, asked = Line(alone=False), Asked()
    for name in "ab":
        line.offer(seat(name))
    assert await line.take(asked) == "a"
    assert asked.times == 0
    assert await line.take(asked) == "b"
    assert asked.times == 1


async def test_on_a_device_the_next_is_given_when_the_one_before_is_gone() -> None:
    line, asked = Line(alone=True), Asked()
    tasks = await waiting(line, asked, 2)
    line.offer(seat("a"))
    line.offer(seat("b"))
    assert await tasks[0] == "a"
    assert (line.held_up, list(line.ready)) == (True, ["b"])
    assert not line.gone(seat("a")), "it had a job"
    assert await tasks[1] == "b"


async def test_one_that_was_lost_is_told() -> None:
    line = Line(alone=True)
    line.offer(seat("a"))
    assert line.gone(seat("a"))
    assert not line.ready


async def test_who_gives_up_leaves_the_executor_to_the_next() -> None:
    line, asked = Line(alone=True), Asked()
    tasks = await waiting(line, asked, 2)
    line.offer(seat("a"))
    tasks[0].cancel()  # before it could run with it
    assert await tasks[1] == "a"
    assert tasks[0].cancelled()
    assert line.held_up


async def test_when_there_will_be_none_all_are_told() -> None:
    line, asked = Line(alone=False), Asked()
    tasks = await waiting(line, asked, 2)
    tasks[0].cancel()
    line.close()
    assert await tasks[1] is None
