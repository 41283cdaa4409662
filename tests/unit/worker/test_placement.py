"""How a model is cut for several devices, and which way of weights is taken: what needs no process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.messages import Load
from edif_hpc.worker.engine.model import device as devices
from edif_hpc.worker.engine.values import Level
from edif_hpc.worker.engine.weights import placement
from edif_hpc.worker.engine.weights.base import MemoryFile, Private
from edif_hpc.worker.engine.weights.placement import Placement, place
from edif_hpc.worker.engine.weights.shared import Shared
from edif_hpc.worker.engine.weights.ways import Keeping

MB = 10**6


class Block(torch.nn.Module):
    """Must stay whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(500, 500), torch.nn.Linear(500, 500)


class Stack(torch.nn.Module):
    """Four blocks of 2 MB, and a head that is tied to the embedding."""

    _no_split_modules = ("Block",)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(500, 500)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(4))
        self.head = torch.nn.Linear(500, 500, bias=False)
        self.head.weight = self.embedding.weight


def test_a_model_is_cut_between_its_blocks_evenly_and_ties_stay_together() -> None:
    module = Stack()
    found = place(module, [80_000 * MB] * 2)
    blocks = [found.index_of(f"blocks.{number}.first.weight") for number in range(4)]
    assert blocks == [found.index_of(f"blocks.{number}.second.bias") for number in range(4)], (
        "whole"
    )
    assert blocks == sorted(blocks)
    assert set(blocks) == {0, 1}
    assert found.index_of("head.weight") == found.index_of("embedding.weight") == 0
    spread = found.spread(module)
    assert spread.index_of("blocks.3.first.weight") == 1


def test_one_device_has_all_of_it() -> None:
    assert place(Stack(), [1]) is placement.WHOLE
    assert placement.WHOLE.index_of("anything.at.all") == 0


def test_a_model_that_does_not_fit_is_told_with_the_sizes() -> None:
    with pytest.raises(
        EngineError, match=r"does not fit on its 2 GPUs of 0\.0, 0\.0 GB: .*--gpus"
    ):
        place(Stack(), [3 * MB] * 2)


def test_the_nearest_part_counts() -> None:
    found = Placement(parts={"": 2, "blocks": 0, "blocks.1": 1})
    names = ("head.weight", "blocks.0.weight", "blocks.1.first.weight", "blocks.10.weight")
    assert [found.index_of(name) for name in names] == [2, 0, 1, 0]


def test_the_sizes_of_devices_are_asked_for_in_a_process_that_is_thrown_away() -> None:
    own = devices.of("cpu:0", 2)
    assert all(size > 0 for size in placement.totals(own, {}, placement.run_forked))

    def broken() -> bytes:
        raise EngineError("no such GPU")

    with pytest.raises(EngineError, match="no such GPU"):
        placement.run_forked(broken)


def load(weights: str, count: int = 1) -> Load:
    return Load(
        model_key="k", more_tasks=[], folder="/", commit=None, adapters={}, dtype="auto", device="cpu:0", threads=1,
        scratch="/", ceiling="full", floor="process", devices=count, weights=weights,
    )  # fmt: skip


class Wrapped:
    """What nnsight wraps a module in."""

    def __init__(self) -> None:
        self._module = Stack()


@pytest.mark.parametrize(
    ("weights", "kind"), [("auto", Private), ("private", Private), ("shared", Shared)]
)
def test_on_a_device_auto_is_private(weights: str, kind: type[Any]) -> None:
    assert type(Keeping(load(weights), devices.of("cpu:0")).holder) is kind
    assert type(Keeping(load(weights), ()).holder) is MemoryFile


def test_what_cannot_be_shared_is_private_and_it_is_said_why(tmp_path: Path) -> None:
    keeping, wrapped = Keeping(load("shared"), devices.of("cpu:0")), Wrapped()
    # Never taken, so that no file has it.
    keeping.prepare({"text-generation": wrapped}, Level.FULL, [tmp_path])
    assert keeping.holder.way == "private"
    assert keeping.missing == [
        "shared weights: a tensor of the model is of a kind that cannot be shared"
    ]
    keeping.prove(None, tmp_path)  # type: ignore[arg-type] # not asked any more


def test_without_walls_nothing_is_shared() -> None:
    keeping = Keeping(load("shared"), devices.of("cpu:0"))
    keeping.prepare({"text-generation": Wrapped()}, Level.PROCESS, [])
    assert (keeping.holder.way, len(keeping.missing)) == ("private", 1)


def test_several_devices_serve_one_task() -> None:
    keeping = Keeping(load("auto", 2), devices.of("cpu:0", 2))
    with pytest.raises(EngineError, match="over 2 GPUs serves one task, not a, b"):
        keeping.prepare({"a": Wrapped(), "b": Wrapped()}, Level.FULL, [])
