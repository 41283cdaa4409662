"""`edif-hpc launcher forward`: what is refused before anything listens."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from edif_hpc.cli.exits import Exit

SITE = """
name = "here"
scheduler = "slurm"
state_dir = "{folder}/state"
route = "{route}"
[gpus.a]
partition = "a"
gres = "gpu:a"
vendor = "none"
max_walltime_min = 5
cpus = 1
mem_gb = 1
"""


def site(folder: Path, route: str = "login") -> str:
    file = folder / "here.toml"
    file.write_text(SITE.format(route=route, folder=folder))
    return str(file)


def test_a_site_whose_pilots_would_not_come(tmp_path: Path, complain: Callable[..., str]) -> None:
    where = site(tmp_path, "direct")
    for command in (["forward"], ["run", "--forward"]):
        said = complain(Exit.SETTINGS, "launcher", *command, "--site", where)
        assert "has route = 'direct'" in said


def test_an_address_that_is_none(tmp_path: Path, complain: Callable[..., str]) -> None:
    command = ["launcher", "forward", "--site", site(tmp_path), "--listen", "login1"]
    assert "'login1' is not HOST:PORT" in complain(Exit.USAGE, *command)


@pytest.mark.parametrize(
    ("name", "said"),
    [("localhost", "which compute nodes cannot reach"), ("nowhere.invalid", "leads nowhere")],
)
def test_a_machine_whose_name_says_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complain: Callable[..., str],
    name: str,
    said: str,
) -> None:
    """Debian gives a machine's own name an address of its loopback."""
    monkeypatch.setattr(socket, "getfqdn", lambda: name)
    told = complain(Exit.SETTINGS, "launcher", "forward", "--site", site(tmp_path))
    assert said in told
    assert "--listen" in told
