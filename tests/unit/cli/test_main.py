"""The root: help without imports, and every error as one line with its exit code."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import click
import pytest

from edif_hpc import errors
from edif_hpc.cli.exits import Exit, exit_code
from edif_hpc.cli.main import ENTRIES, main

HEAVY = ("torch", "uvicorn", "starlette", "zmq", "httpx", "submitit", "nnsight", "msgspec")


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom edif_hpc.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        f"sys.exit(', '.join(each for each in {HEAVY} if each in sys.modules) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert all(name in done.stdout for name in ENTRIES)


@pytest.mark.parametrize("name", ENTRIES)
def test_the_table_tells_what_the_command_tells(name: str) -> None:
    command = ENTRIES[name].load()
    assert command.name == name
    assert command.get_short_help_str(200) == ENTRIES[name].summary


def every_command(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    ctx = click.Context(group)
    found = []
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        found += (
            every_command(command, (*path, name))
            if isinstance(command, click.Group)
            else [(*path, name)]
        )
    return found


@pytest.mark.parametrize("path", every_command(main), ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...], run: Callable[..., Any]) -> None:
    result = run(*path, "--help")
    assert result.exit_code == Exit.OK
    assert "Usage: edif-hpc" in result.stdout


@pytest.mark.parametrize(
    "path", [p for p in every_command(main) if p[-1] in {"ls", "ps", "status"}], ids=" ".join
)
def test_every_listing_speaks_json(path: tuple[str, ...], run: Callable[..., Any]) -> None:
    assert "--json" in run(*path, "--help").stdout


def test_a_misspelt_command_is_a_usage_error(complain: Callable[..., str]) -> None:
    assert "No such command 'pss'" in complain(Exit.USAGE, "pss")


def test_a_misspelt_option_says_where_help_is(complain: Callable[..., str]) -> None:
    assert "(see edif-hpc deployment add --help)" in complain(
        Exit.USAGE, "deployment", "add", "a/b", "--replica", "2"
    )


def test_no_relay(complain: Callable[..., str]) -> None:
    said = complain(Exit.UNREACHABLE, "--relay", "http://127.0.0.1:9", "ps")
    assert "http://127.0.0.1:9 does not answer" in said
    assert "edif-hpc relay serve" in said


def test_no_token(complain: Callable[..., str]) -> None:
    assert "set EDIF_TOKEN" in complain(Exit.SETTINGS, "ps", EDIF_TOKEN="")


def test_a_setting_that_does_not_exist(complain: Callable[..., str]) -> None:
    assert "client: tokn" in complain(Exit.SETTINGS, "ps", EDIF_CLIENT_TOKN="x")


def test_a_refusal_keeps_the_words_of_the_relay(relay: Any, complain: Callable[..., str]) -> None:
    relay.refuse("GET", "/api/ps", 403, "not_permitted", "this needs an\noperator's")
    assert complain(Exit.REFUSED, "ps") == "edif-hpc: this needs an operator's"


def test_a_relay_that_cannot_serve_now(relay: Any, complain: Callable[..., str]) -> None:
    relay.refuse("GET", "/api/ps", 503, "store_unavailable", "the disk is full")
    assert "the disk is full" in complain(Exit.UNREACHABLE, "ps")


def test_an_answer_that_is_no_relays(relay: Any, complain: Callable[..., str]) -> None:
    relay.send("GET", "/api/ps", b"<h1>Bad gateway</h1>", status=502)
    said = complain(Exit.UNREACHABLE, "ps")
    assert "HTTP 502" in said
    assert "did not answer like a relay" in said


def test_what_nobody_expected_is_one_line(relay: Any, complain: Callable[..., str]) -> None:
    relay.on("GET", "/api/ps", {"nothing": "useful"})
    assert "unexpected KeyError: 'processes'; run edif-hpc --traceback" in complain(
        Exit.FAILED, "ps"
    )


def test_the_traceback_is_there_for_who_asks(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", "/api/ps", {"nothing": "useful"})
    assert isinstance(run("--traceback", "ps").exception, KeyError)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NotFound("x"), Exit.REFUSED),
        (errors.StaleAttempt("x"), Exit.REFUSED),
        (errors.StoreUnavailable("x"), Exit.UNREACHABLE),
        (errors.SettingsError("x"), Exit.SETTINGS),
        (errors.LaunchError("x"), Exit.FAILED),
    ],
)
def test_exit_codes(error: errors.EdifError, code: Exit) -> None:
    assert exit_code(error) is code
