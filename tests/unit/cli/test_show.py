"""What others wrote cannot steer the terminal of whoever looks at it."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[8mhidden\x9b2K\r\u202egnp.exe"
FORGED = "fine\nname      state\nforged    COMPLETED"


def obeyed(text: str) -> set[str]:
    return {each for each in text if unicodedata.category(each) in {"Cc", "Cf"} and each != "\n"}


def request(**more: Any) -> dict[str, Any]:
    return {
        "id": "ab12", "state": "ERROR", "deployment": ESCAPES, "owner": ESCAPES, "accepted_at": 1.0, "shown": "ERROR",
        "ended_at": 2.0, "attempt": 1, "description": ESCAPES + FORGED, "failure": {"kind": "user", "message": ESCAPES},
        "position": 0, "ahead": None, "start_in_s": None, "expires_at": 3.0, "crashes": 0, "meta": {"isolation": ESCAPES},
        **more,
    }  # fmt: skip


@pytest.fixture(params=[["request", "ls"], ["request", "explain", "ab12"], ["ps"], ["status"]])
def shown(request: pytest.FixtureRequest, relay: Any, run: Callable[..., Result]) -> Result:
    """A command whose relay tells it hostile text."""
    one = globals()["request"]()
    relay.on("GET", "/api/requests", {"requests": [one]})
    relay.on("GET", "/api/requests/ab12", one)
    relay.on("GET", "/api/requests/ab12/explain", one | {"why": ESCAPES + FORGED, "attempts": []})
    relay.refuse("GET", "/api/ps", 503, "unavailable", ESCAPES + FORGED)
    relay.refuse("GET", "/api/status", 503, "unavailable", ESCAPES + FORGED)
    return run(*request.param)


def test_what_a_relay_tells_is_only_shown(shown: Result) -> None:
    assert obeyed(shown.output) == set()
    assert "owned" in shown.output or "gnp.exe" in shown.output
    assert not any(line.startswith("forged") for line in shown.output.splitlines())
