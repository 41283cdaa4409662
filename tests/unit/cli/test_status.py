"""`status`: an operator sees what waits, a researcher what is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SERVED = {
    "tiny/0": {
        "application_state": "RUNNING",
        "repo_id": "edif/tiny-gpt2",
        "task": "text-generation",
    }
}


def test_for_an_operator(relay: Any, run: Callable[..., Any]) -> None:
    counts = {"QUEUED": 3, "DISPATCHED": 0, "RUNNING": 1}
    relay.on("GET", "/api/status", {"deployments": SERVED, "requests": counts, "sessions": 2})
    result = run("status").stdout
    assert "RUNNING" in result
    assert result.endswith("requests: 3 queued, 0 dispatched, 1 running; connected clients: 2\n")


def test_for_a_researcher(relay: Any, run: Callable[..., Any]) -> None:
    relay.refuse("GET", "/api/status", 403, "not_permitted", "this needs an operator's")
    relay.on("GET", "/status", {"deployments": SERVED})
    assert "tiny/0" in run("status").stdout
    assert "authorization" not in relay.calls[-1].headers
