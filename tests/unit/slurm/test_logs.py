"""Logs of allocations: the newest, its end, and what is added to it."""

from __future__ import annotations

import os
from pathlib import Path

from edif_hpc.cli.allocations.logs import follow
from edif_hpc.slurm.logs import log_of, read_end, tail


def test_the_newest_log(tmp_path: Path) -> None:
    for number, name in enumerate(("9_0_log.out", "10_0_log.out")):
        (tmp_path / name).write_text(f"{name}\n")
        os.utime(tmp_path / name, (number, number))
    (tmp_path / "10_submission.sh").touch()
    assert log_of(tmp_path) == tmp_path / "10_0_log.out"
    assert log_of(tmp_path, "9") == tmp_path / "9_0_log.out"
    assert log_of(tmp_path, "0") is None


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert log_of(tmp_path / "nothing") is None
    assert tail(tmp_path / "nothing", 3) == []


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    (tmp_path / "1_0_log.out").write_bytes(b"x" * 200_000 + b"\n\xff bytes\nlast\n")
    assert tail(tmp_path, 2) == ["\ufffd bytes", "last"]


def test_what_is_added_is_shown(tmp_path: Path) -> None:
    log = tmp_path / "1_0_log.out"
    log.write_text("one\ntwo\n")
    lines, read = read_end(log, 1)
    with log.open("a") as file:
        file.write("three\nfo")
    assert lines == ["two"]
    assert next(follow(log, read)) == "three\nfo", "also what came before anybody looked"
