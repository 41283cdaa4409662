"""The process that has shared weights, with a module beside it that opens them: the real one, on stand-ins for devices."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.weights.base import Spread
from edif_hpc.worker.engine.weights.shared import Shared

CPU = torch.device("cpu")


class Odd(torch.nn.Module):
    """Ties, a view, an odd dtype, a buffer outside checkpoints, a plain attribute, an empty one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 5)
        self.head = torch.nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.halved = torch.nn.Parameter(torch.randn(3, 3).to(torch.bfloat16), requires_grad=False)
        self.register_buffer("frequencies", torch.arange(4.0), persistent=False)
        self.register_buffer("tail", self.frequencies[2:], persistent=False)
        self.register_buffer("nothing", torch.empty(0))
        self.original = self.frequencies


def alternating(module: torch.nn.Module) -> Spread:
    """Each tensor on the other of two devices than the one before."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return Spread(module=module, index_of=lambda name: names.index(name) % 2)


@pytest.fixture(params=[1, 2], ids=["one device", "two"], scope="module")
def opened(
    request: pytest.FixtureRequest,
) -> Iterator[tuple[Shared, Odd, dict[str, torch.Tensor]]]:
    """A holder, a module that uses what it has, and what is right."""
    torch.manual_seed(0)
    module, shared = Odd(), Shared()
    right = {name: each.clone() for name, each in named(module).items()}
    shared.take(module, lambda *_: None)
    spread = Spread.whole(module) if request.param == 1 else alternating(module)
    shared.start([spread], "cpu:0", request.param, driver={}, readable=[])
    try:
        shared.open([spread], [CPU] * request.param)
        yield shared, module, right
    finally:
        shared.stop()


def named(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def as_it_was(module: torch.nn.Module, right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(each, right[name]) for name, each in named(module).items())


Opened = tuple[Shared, Odd, dict[str, torch.Tensor]]


def test_values_ties_views_and_identity_stay(opened: Opened) -> None:
    _, module, right = opened
    assert as_it_was(module, right)
    assert module.head.weight is module.embedding.weight
    assert module.original is module.frequencies
    assert module.frequencies.data_ptr() + 8 == module.tail.data_ptr()
    assert not module.halved.requires_grad
    assert module.embedding.weight.requires_grad


def test_nothing_changed_is_nothing_restored(opened: Opened) -> None:
    shared, _, _ = opened
    settled = shared.settle([])
    assert settled.restored == 0
    assert settled.seconds > 0


def test_an_edit_is_undone_in_every_tensor_that_has_it(opened: Opened) -> None:
    shared, module, right = opened
    with torch.no_grad():
        module.head.weight.add_(1)
        module.tail[0] = 9
        assert module.frequencies[2] == 9
        assert module.embedding.weight[0, 0] == right["embedding.weight"][0, 0] + 1
    assert shared.settle([]).restored == 2
    assert as_it_was(module, right)


def test_two_numbers_that_changed_places_are_seen(opened: Opened) -> None:
    shared, module, right = opened
    module.frequencies[:2] = torch.tensor([1.0, 0.0])
    assert shared.settle([]).restored == 1
    assert as_it_was(module, right)


def test_a_buffer_and_a_special_number_are_restored_bit_for_bit(opened: Opened) -> None:
    shared, module, right = opened
    module.frequencies.fill_(float("nan"))
    module.halved.data.view(torch.int16)[0, 0] ^= 1
    assert shared.settle([]).restored == 2
    assert as_it_was(module, right)


def test_what_is_not_there_cannot_be_started(tmp_path: Path) -> None:
    if torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        pytest.skip("this torch has CUDA")
    module, shared = Odd(), Shared()
    shared.take(module, lambda *_: None)
    try:
        with pytest.raises(EngineError, match="built for neither CUDA nor ROCm"):
            shared.start([Spread.whole(module)], "cuda", 1, driver={}, readable=[tmp_path])
    finally:
        shared.stop()


def test_a_holder_that_dies_is_told_and_not_waited_for() -> None:
    module, shared = Odd(), Shared()
    shared.take(module, lambda *_: None)
    shared.start([Spread.whole(module)], "cpu:0", 1, driver={}, readable=[])
    assert shared._process is not None
    os.kill(shared._process.pid, signal.SIGKILL)
    with pytest.raises(
        EngineError, match=r"the process that held the weights ended \(status -9\)"
    ):
        shared.settle([])
    assert "ended (status -9)" in str(shared.ended())
    shared.stop()


def test_a_holder_that_was_not_started_is_stopped() -> None:
    Shared().stop()


def test_it_is_locked_up(opened: Opened) -> None:
    shared, _, _ = opened
    assert shared._process is not None
    lines = Path(f"/proc/{shared._process.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapInh")} == {0}
