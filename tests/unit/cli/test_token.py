"""`token`: made once, shown once, listed without secrets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit

MADE = {
    "id": "0123456789ab", "name": "ada", "role": "researcher", "created_at": 1.7e9, "expires_at": None,
    "revoked_at": None, "limits": {"wall_s": 1800.0, "memory_bytes": 8 << 30, "log_lines": None}, "queue_s": None,
    "keep": False,
}  # fmt: skip


def test_create(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/tokens", MADE | {"token": "edif_0123456789ab_new"})
    result = run("token", "create", "ada", "--expires", "90d", "--max-wall", "30min", "--keep")
    assert result.stdout == f"export NDIF_HOST={relay.url} NDIF_API_KEY=edif_0123456789ab_new\n"
    assert "not shown again" in result.stderr
    assert relay.bodies("POST", "/api/tokens") == [
        {
            "role": "researcher", "name": "ada", "expires_in_s": 7776000.0, "queue_s": None,
            "keep": True, "limits": {"wall_s": 1800.0},
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
    assert " ".join(row[-8:]) == "- - wall 1800 s, memory 8 GiB"


def test_revoke(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("DELETE", "/api/tokens/0123456789ab", MADE)
    assert run("token", "revoke", "0123456789ab").stdout == "revoked 0123456789ab (ada)\n"


def test_set(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/tokens/0123456789ab/limits", MADE)
    options = "--max-memory 8GB --max-gpu-memory 1.5GiB --max-log-lines 7 --max-result none"
    result = run("token", "set", "0123456789ab", *options.split())
    assert result.stdout == "limits of ada: wall 1800 s, memory 8 GiB\n"
    assert relay.bodies("POST", "/api/tokens/0123456789ab/limits") == [
        {
            "memory_bytes": 8_000_000_000, "gpu_memory_bytes": 1_610_612_736, "log_lines": 7, "result_bytes": None,
        }
    ]  # fmt: skip


def test_set_needs_something_to_set(relay: Any, complain: Callable[..., str]) -> None:
    assert "--max-wall" in complain(Exit.USAGE, "token", "set", "0123456789ab")
    assert relay.calls == []


@pytest.mark.parametrize("text", ["8", "8 gb", "-1GB", "GB", "1e9B", ""])
def test_a_size_has_a_unit(text: str, complain: Callable[..., str]) -> None:
    assert "write 512MiB, 8GB or 1.5GiB" in complain(
        Exit.USAGE, "token", "create", "ada", "--max-memory", text
    )


def test_limits_of_ones_own(relay: Any, run: Callable[..., Any], complain: Any) -> None:
    limits = {
        "wall_s": {"value": 60.0, "set_by": "the token ada"},
        "gpu_memory_bytes": {"value": None, "set_by": None},
        "newer": {"value": 1, "set_by": "a newer relay"},
    }
    told = {"deployments": {"tiny": {"repo_id": "a/b", "limits": limits}}}
    relay.on("GET", "/api/limits", told)
    lines = run("token", "limits").stdout.splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["tiny", "wall", "60", "s", "the", "token", "ada"],
        ["tiny", "gpu-memory", "no", "limit", "-"],
    ]
    assert run("token", "limits", "--deployment", "tiny").stdout.splitlines() == lines
    assert "deployed: tiny" in complain(Exit.REFUSED, "token", "limits", "--deployment", "big")
