"""`token`: made once, shown once, listed without secrets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit

MADE = {
    "id": "0123456789ab", "name": "ada", "role": "researcher", "created_at": 1.7e9, "expires_at": None,
    "revoked_at": None, "max_wall_s": None, "queue_s": None, "keep": False,
}  # fmt: skip


def test_create(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/tokens", MADE | {"token": "edif_0123456789ab_new"})
    result = run("token", "create", "ada", "--expires", "90d", "--max-wall", "30min", "--keep")
    assert result.stdout == f"export NDIF_HOST={relay.url} NDIF_API_KEY=edif_0123456789ab_new\n"
    assert "not shown again" in result.stderr
    assert relay.bodies("POST", "/api/tokens") == [
        {
            "role": "researcher", "name": "ada", "expires_in_s": 7776000.0, "max_wall_s": 1800.0, "queue_s": None,
            "keep": True,
        }
    ]  # fmt: skip


def test_create_an_operators(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/tokens", MADE | {"token": "edif_0123456789ab_new"})
    run("token", "create", "grace", "--operator")
    assert relay.bodies("POST", "/api/tokens")[0]["role"] == "operator"


@pytest.mark.parametrize("text", ["90", "d", "-5d", "1w", "1e3s", ""])
def test_a_duration_has_a_unit(text: str, complain: Callable[..., str]) -> None:
    assert "write 90s, 30min, 12h or 7d" in complain(
        Exit.USAGE, "token", "create", "ada", "--expires", text
    )


def test_ls(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", "/api/tokens", {"tokens": [MADE]})
    row = run("token", "ls").stdout.splitlines()[1].split()
    assert row[:3] == ["0123456789ab", "ada", "researcher"]
    assert row[-2:] == ["-", "-"]


def test_revoke(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("DELETE", "/api/tokens/0123456789ab", MADE)
    assert run("token", "revoke", "0123456789ab").stdout == "revoked 0123456789ab (ada)\n"
