from __future__ import annotations

import asyncio
import threading

import pytest

from edif_hpc.testing.wait import wait_until, wait_until_async


def test_returns_the_first_truthy_value() -> None:
    values = iter([None, 0, "", "here"])
    assert wait_until(lambda: next(values), 5, "a value") == "here"


def test_sees_what_another_thread_does() -> None:
    done = threading.Event()
    threading.Timer(0.02, done.set).start()
    assert wait_until(done.is_set, 5, "the timer")


def test_fails_with_the_words_of_the_caller_and_the_last_value() -> None:
    with pytest.raises(TimeoutError, match=r"three workers: not within 0\.02 s.* was 0"):
        wait_until(lambda: 0, 0.02, "three workers")


async def test_lets_the_loop_run_meanwhile() -> None:
    done = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, done.set)
    assert await wait_until_async(done.is_set, 5, "the callback")


async def test_async_fails_alike() -> None:
    with pytest.raises(TimeoutError, match=r"never: not within 0\.02 s"):
        await wait_until_async(lambda: False, 0.02, "never")
