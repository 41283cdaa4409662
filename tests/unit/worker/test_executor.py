"""How an executor gets ready for a device: after its walls, and with a word if it cannot. What it uses notes when it is used."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine import executor
from edif_hpc.worker.engine.messages import FROM_EXECUTOR, Fork, Message, Ready, Refused
from edif_hpc.worker.engine.protocol import FROM_WORKER_BYTES, Channel
from edif_hpc.worker.engine.request.console import Console
from edif_hpc.worker.engine.walls.jail import CHOICES, Layers
from edif_hpc.worker.engine.weights.base import Spread

GB = 10**9


@dataclass(kw_only=True)
class Noting:
    """A jail, a holder and a device that write down what is asked of them, and whether devices were seen by then."""

    notes: Path
    refusal: str = ""
    broken_wall: str = ""
    torch: torch.device = torch.device("cpu")  # noqa: RUF009 - a value
    gpu: bool = False
    copies: bool = True
    layers: Layers = CHOICES[-1]

    def note(self, what: str) -> None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        with self.notes.open("a") as file:
            file.write(f"{what} {seen or 'none'}\n")

    def enter(self, folder: Path) -> list[str]:  # noqa: ARG002 - as a jail has it
        self.note("walls")
        if self.broken_wall:
            raise OSError(self.broken_wall)
        return ["landlock", "seccomp"]

    def start(self) -> str:
        self.note("driver")
        if self.refusal:
            raise EngineError(self.refusal)
        return "A6000"

    def memory(self) -> tuple[int, int]:
        self.note("memory")
        return 47 * GB, 48 * GB

    def open(self, spreads: Sequence[Spread], devices: Sequence[torch.device]) -> None:  # noqa: ARG002
        self.note("weights")


def said(noting: Any, monkeypatch: pytest.MonkeyPatch, order: Fork) -> Message:
    """Fork an executor of a house without models; return the first that it says."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    house = executor.House(
        models={}, random_weights={}, graded=frozenset(), adapters={}, jail=noting, threads=1, scratch=noting.notes.parent,
        selftests={}, consoles=(Console(), Console()), holder=noting, devices=[noting], placements={}, driver={"CUDA_VISIBLE_DEVICES": "3"}, stores=(),
    )  # fmt: skip
    ours, theirs = socket.socketpair()
    with tempfile.TemporaryFile() as result, theirs:
        pid = os.fork()
        if pid == 0:
            executor.main(house, order, [theirs.fileno(), result.fileno()])
    channel = Channel(ours, accepts=FROM_EXECUTOR, send_limit=FROM_WORKER_BYTES)
    try:
        message, _ = channel.receive()
    finally:
        ours.close()
        os.waitpid(pid, 0)
    return message


def test_a_driver_is_started_behind_walls_and_with_the_devices_that_are_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting = Noting(notes=tmp_path / "notes")
    message = said(noting, monkeypatch, Fork(executor=1, rehearse=False))
    assert isinstance(message, Ready)
    assert (message.steps, message.device_name) == (["landlock", "seccomp"], "A6000")
    assert (message.free_bytes, message.graded) == ([47 * GB], [])
    lines = noting.notes.read_text().splitlines()
    assert lines == ["walls none", "driver 3", "memory 3", "weights 3"]


def test_a_later_executor_takes_what_the_first_has_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting = Noting(notes=tmp_path / "notes")
    order = Fork(executor=2, rehearse=False, free_bytes=[46 * GB], graded=["fill-mask"])
    message = said(noting, monkeypatch, order)
    assert isinstance(message, Ready)
    assert message.graded == ["fill-mask"]


def test_an_executor_that_shares_weights_waits_for_no_memory_and_tells_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting = Noting(notes=tmp_path / "notes", copies=False)
    message = said(noting, monkeypatch, Fork(executor=1, rehearse=False))
    assert isinstance(message, Ready)
    assert message.free_bytes == [47 * GB]
    lines = noting.notes.read_text().splitlines()
    assert lines == ["walls none", "driver 3", "weights 3", "memory 3"]


def test_an_executor_that_cannot_use_the_device_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting = Noting(notes=tmp_path / "notes", refusal="the GPU cannot be used: busy")
    message = said(noting, monkeypatch, Fork(executor=1, rehearse=False))
    assert message == Refused(code="engine", message="the GPU cannot be used: busy")
    assert "weights" not in noting.notes.read_text()


def test_an_executor_that_cannot_be_locked_up_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting = Noting(notes=tmp_path / "notes", broken_wall="mount: no")
    message = said(noting, monkeypatch, Fork(executor=1, rehearse=False))
    assert message == Refused(code="engine", message="OSError: mount: no")
    assert noting.notes.read_text() == "walls none\n"
