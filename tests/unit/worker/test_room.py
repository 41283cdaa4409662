"""Whether a model fits, told from headers and control groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine import evidence
from edif_hpc.worker.engine.model import room
from edif_hpc.worker.engine.walls import cgroup

MB = 1_000_000


def checkpoint(
    folder: Path, name: str = "model.safetensors", **tensors: tuple[str, list[int], int]
) -> Path:
    """A file that declares tensors (dtype, shape, bytes) and holds none of them."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for key, (dtype, shape, size) in tensors.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    file = folder / name
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


@pytest.mark.parametrize(
    ("dtype", "size"), [("auto", 14), ("float32", 22), ("bfloat16", 14), ("float64", 38)]
)
def test_how_large_it_becomes(tmp_path: Path, dtype: str, size: int) -> None:
    """Whole numbers keep their size; 4 of them are 6 bytes here, 2 are halves, 2 floats."""
    checkpoint(tmp_path, w=("BF16", [2, 1], 4), ids=("I16", [3], 6))
    checkpoint(tmp_path, "more.safetensors", b=("F16", [2], 4))
    assert room.weights_bytes(tmp_path, dtype=dtype) == size


def test_other_files_count_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 100)
    assert room.weights_bytes(tmp_path, dtype="bfloat16") == 100


def test_what_is_no_safetensors_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(EngineError, match=r"model\.safetensors is no safetensors file"):
        room.weights_bytes(tmp_path, dtype="auto")


def test_what_cannot_fit_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, w=("F32", [25 * 10**9], 100 * 10**9))
    room.check(tmp_path, dtype="float32", free=100 * 10**9)
    room.check(tmp_path, dtype="float32", free=None)
    room.check(tmp_path, dtype="bfloat16", free=50 * 10**9)
    with pytest.raises(
        EngineError, match=r"take 100\.0 GB as float32, and 64\.0 GB of memory are free"
    ):
        room.check(tmp_path, dtype="float32", free=64 * 10**9)


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def test_the_narrowest_limit_counts(tmp_path: Path) -> None:
    """Version 2 within a job that has less; a group without a limit says nothing."""
    job = group(
        tmp_path / "job",
        memory__max="900\n",
        memory__current="500\n",
        memory__stat="anon 1\ninactive_file 100\n",
    )
    step = group(
        job / "step",
        memory__max="max\n",
        memory__current="400\n",
        memory__stat="inactive_file 9\n",
    )
    old = group(
        tmp_path / "old",
        memory__limit_in_bytes="1000\n",
        memory__usage_in_bytes="1100\n",
        memory__stat="total_inactive_file 40\n",
    )
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:       2 kB\n")
    assert room.free_bytes([step, job], meminfo) == 500
    assert room.free_bytes([step], meminfo) == 2048
    assert room.free_bytes([old], meminfo) == 0
    assert room.free_bytes([], tmp_path / "none") is None


@pytest.mark.parametrize(
    ("line", "top"), [("0::/job/step", ""), ("4:cpu,memory:/job/step", "memory")]
)
def test_groups_are_found_up_to_the_top(tmp_path: Path, line: str, top: str) -> None:
    own = tmp_path / "own"
    own.write_text(f"9:cpuset:/elsewhere\n{line}\n")
    base = tmp_path / top
    assert list(cgroup.memory_groups(tmp_path, own)) == [base / "job/step", base / "job", base]


def test_this_machine_tells() -> None:
    free = room.free_bytes()
    assert free is not None
    assert free > MB
    assert evidence.oom_kills() >= 0
