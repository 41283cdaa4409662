"""`relay init`: a relay, and a settings file that only its owner can read."""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit


@pytest.fixture
def config(environ: dict[str, str]) -> Path:
    for name in ("EDIF_RELAY", "EDIF_TOKEN"):
        del environ[name]
    return Path(environ["EDIF_CONFIG"])


def test_init_writes_what_the_next_commands_need(
    config: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    config.unlink()
    result = run(
        "relay", "init", "--data-dir", str(tmp_path / "r"), "--port", "8799", "--name", "ada"
    )
    assert result.exit_code == Exit.OK, result.output
    tables = tomllib.loads(config.read_text())
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "r").stat().st_mode) == 0o700
    assert tables["relay"] == {"data_dir": str(tmp_path / "r"), "port": 8799}
    assert tables["client"]["relay"] == "http://127.0.0.1:8799"
    assert tables["client"]["token"].startswith("edif_")
    assert tables["client"]["token"] not in result.output
    assert "  edif-hpc relay serve" in result.stdout.splitlines()


def test_a_client_table_stays_as_it_is(config: Path, run: Callable[..., Any]) -> None:
    before = '[client]\nrelay = "https://elsewhere"\n'
    config.write_text(before)
    result = run("relay", "init", "--port", "8799")
    assert config.read_text().startswith(before)
    assert tomllib.loads(config.read_text())["client"] == {"relay": "https://elsewhere"}
    assert "export EDIF_TOKEN=edif_" in result.stdout


def test_a_relay_table_stays_and_the_flags_are_repeated(
    config: Path, run: Callable[..., Any]
) -> None:
    config.write_text("[relay]\nport = 8798\n")
    result = run("relay", "init", "--port", "8799")
    assert tomllib.loads(config.read_text())["relay"] == {"port": 8798}
    assert "  edif-hpc relay serve --port 8799" in result.stdout.splitlines()


def test_a_file_that_others_could_read_is_closed_before_the_token_is_in_it(
    config: Path, run: Callable[..., Any]
) -> None:
    config.chmod(0o644)
    run("relay", "init")
    assert stat.S_IMODE(config.stat().st_mode) == 0o600


def test_a_second_relay_is_refused(
    config: Path, run: Callable[..., Any], complain: Callable[..., str]
) -> None:
    run("relay", "init")
    before = config.read_text()
    assert "holds a relay already" in complain(Exit.REFUSED, "relay", "init")
    assert config.read_text() == before


def test_a_file_that_cannot_be_written_makes_no_relay(
    config: Path, complain: Callable[..., str], tmp_path: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    said = complain(Exit.SETTINGS, "--config", str(blocked / "config.toml"), "relay", "init")
    assert "cannot be written" in said
    assert not (tmp_path / "relay").exists()


def test_a_file_that_is_no_toml(config: Path, complain: Callable[..., str]) -> None:
    config.write_text("this is not = = toml")
    assert "mend or move it" in complain(Exit.SETTINGS, "relay", "init")


def test_serve_without_a_relay_says_how_to_make_one(
    config: Path, complain: Callable[..., str]
) -> None:
    config.write_text("")
    assert "edif-hpc relay init" in complain(Exit.SETTINGS, "relay", "serve", "--port", "0")
