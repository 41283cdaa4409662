"""Folders as nobody makes them who means well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edif_hpc.worker.engine.walls import folders

MIB = 1 << 20
OWN = Path("/proc/self/fd")


@pytest.fixture
def none_open(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("none-open")


def test_all_files_are_added_up_each_once(tmp_path: Path, none_open: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one").write_bytes(b"x" * MIB)
    os.link(tmp_path / "a" / "b" / "one", tmp_path / "same")
    (tmp_path / "link").symlink_to("/")
    found = folders.contents(tmp_path, none_open)
    assert MIB <= found.bytes < 2 * MIB
    assert (found.count, found.complaint) == (4, "")


def test_what_is_deleted_and_open_counts(tmp_path: Path) -> None:
    with (tmp_path / "one").open("wb") as opened:
        opened.write(b"x" * MIB)
        opened.flush()
        (tmp_path / "one").unlink()
        meanwhile = folders.contents(tmp_path, OWN).bytes
    assert meanwhile - folders.contents(tmp_path, OWN).bytes >= MIB


def test_a_file_without_content_is_counted_but_takes_nothing(
    tmp_path: Path, none_open: Path
) -> None:
    with (tmp_path / "sparse").open("wb") as opened:
        opened.truncate(1 << 40)
    found = folders.contents(tmp_path, none_open)
    assert (found.count, found.bytes) == (1, 0)


def dig(folder: Path, depth: int) -> None:
    here = Path.cwd()
    os.chdir(folder)
    for _ in range(depth):
        os.mkdir("in")  # noqa: PTH102 - relative: the path is too long for the kernel
        os.chdir("in")
    os.chdir(here)


def test_what_is_too_deep_is_not_counted_and_said(tmp_path: Path, none_open: Path) -> None:
    dig(tmp_path, folders.DEPTH + 1)
    assert "deep" in folders.contents(tmp_path, none_open).complaint


def test_no_more_is_counted_than_there_may_be(
    tmp_path: Path, none_open: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "FILES", 5)
    for number in range(10):
        (tmp_path / str(number)).touch()
    assert folders.contents(tmp_path, none_open).count == 6


def test_whatever_is_there_is_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    folder = tmp_path / "folder"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / ("x" * 255)).touch()
    (folder / "link").symlink_to(outside)
    dig(folder, 1200)
    (folder / "a" / "b").chmod(0)
    (folder / "a").chmod(0)
    folders.removed(folder)
    assert not folder.exists()
    assert (outside / "kept").exists()
