"""Folders that executors may read: what is refused before they are opened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.messages import Load
from edif_hpc.worker.engine.model.stores import admit


def load(tmp_path: Path, **folders: list[str]) -> Load:
    facts: dict[str, Any] = dict.fromkeys(
        ("model_key", "folder", "dtype", "device", "ceiling", "floor"), ""
    )
    scratch = tmp_path / "node" / "engine"
    scratch.mkdir(parents=True, exist_ok=True)
    own = {"more_tasks": [], "commit": None, "adapters": {}, "threads": 1, "scratch": str(scratch)}
    return Load(**facts, **own, **folders)


def test_libraries_are_searched_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [*sys.path]
    monkeypatch.setattr(sys, "path", [*before])
    (tmp_path / "python").mkdir()
    admit(load(tmp_path, stores=[str(tmp_path / "python")], libraries=[str(tmp_path / "python")]))
    assert sys.path == [*before, str(tmp_path / "python")]


@pytest.mark.parametrize("kind", ["stores", "libraries"])
def test_what_is_not_there_is_named(tmp_path: Path, kind: str) -> None:
    with pytest.raises(
        EngineError, match=rf"{tmp_path}/gone, one of the site's {kind}.*No such file"
    ):
        admit(load(tmp_path, **{kind: [str(tmp_path / "gone")]}))


def test_what_holds_the_workers_own_files_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "data"
    link.symlink_to(tmp_path / "node")
    told = load(tmp_path, stores=[str(link)])
    with pytest.raises(EngineError, match="holds the worker's own files"):
        admit(told)
