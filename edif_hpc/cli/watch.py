"""Waiting for what the relay brings about: look, show, look again, until it is so or the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

_T = TypeVar("_T")

INTERVAL_S = 0.3


def watch(
    look: Callable[[], _T], *, timeout_s: float | None = None, interval_s: float = INTERVAL_S
) -> Iterator[_T]:
    """Yield what `look` sees, again and again; ends when the time is over, if there is a limit."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    while True:
        yield look()
        if deadline is not None and time.monotonic() >= deadline:
            return
        time.sleep(interval_s)
