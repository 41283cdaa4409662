"""Waiting for a condition that other processes bring about.

A test never sleeps for a while and hopes. It states what has to become true and by when; these two
functions look again at short intervals, return as soon as it is, and otherwise fail with the words
of the caller. They are the only place in the tests that polls. Whatever can be awaited directly (an
event, a future, a frame) should be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

INTERVAL_S = 0.01


def wait_until(predicate: Callable[[], T], timeout_s: float, what: str) -> T:
    """Return the first truthy value of `predicate()`.

    Raises:
        TimeoutError: it was not so within `timeout_s`; the message holds `what` and the last value.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise TimeoutError(_complaint(what, timeout_s, value))
        time.sleep(INTERVAL_S)


async def wait_until_async(predicate: Callable[[], T], timeout_s: float, what: str) -> T:
    """Do as `wait_until`, and let the event loop run meanwhile.

    Raises:
        TimeoutError: it was not so within `timeout_s`; the message holds `what` and the last value.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise TimeoutError(_complaint(what, timeout_s, value))
        await asyncio.sleep(INTERVAL_S)


def _complaint(what: str, timeout_s: float, value: object) -> str:
    return f"{what}: not within {timeout_s} s; the last value was {value!r}"
