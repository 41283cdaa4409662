"""Moving weights changes where they lie and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edif_hpc.worker.engine.messages import Settled
from edif_hpc.worker.engine.weights.base import MemoryFile, Private, Spread, sizes


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


def test_values_ties_views_and_identity_stay() -> None:
    torch.manual_seed(0)
    module = Odd()
    before = {name: tensor.clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    identities = {name: id(tensor) for name, tensor in module.named_parameters()}
    seen: list[tuple[int, int]] = []
    size = MemoryFile().take(module, lambda done, total: seen.append((done, total)))
    assert size == 7 * 5 * 4 + 9 * 2 + 4 * 4
    assert seen[-1] == (size, size)
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name])
        assert tensor.requires_grad == before[name].requires_grad
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == identities
    assert module.head.weight is module.embedding.weight
    assert module.original is module.frequencies
    frequencies, tail = module.frequencies, module.tail
    assert isinstance(frequencies, torch.Tensor)
    assert isinstance(tail, torch.Tensor)
    frequencies[2] = 40
    assert tail[0] == 40
    assert not module.halved.requires_grad


def test_a_childs_writes_are_its_own() -> None:
    module = torch.nn.Linear(4, 4)
    MemoryFile().take(module, lambda *_: None)
    before = module.weight.detach().clone()
    pid = os.fork()
    if pid == 0:
        with torch.no_grad():
            module.weight.zero_()
        os._exit(int(module.weight.abs().sum().item() != 0))
    assert os.waitpid(pid, 0)[1] == 0
    assert torch.equal(module.weight, before)


def test_the_file_is_sealed() -> None:
    module = torch.nn.Linear(4, 4)
    MemoryFile().take(module, lambda *_: None)
    maps = Path("/proc/self/maps").read_text().splitlines()
    mapped = [line.split()[1] for line in maps if "memfd:weights" in line]
    assert mapped
    assert set(mapped) == {"rw-p"}
    held = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if _is_weights(fd)]
    for fd in held:
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)


def test_what_a_second_module_has_in_common_is_kept_once() -> None:
    torch.manual_seed(0)
    first, second = Odd(), Odd()
    second.load_state_dict(first.state_dict())
    second.halved.data += 1
    holder = MemoryFile()
    assert holder.take(first, lambda *_: None) == 7 * 5 * 4 + 9 * 2 + 4 * 4
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert holder.take(second, lambda *_: None) == 9 * 2
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert second.embedding.weight.data_ptr() == first.embedding.weight.data_ptr()
    assert second.frequencies.data_ptr() == first.frequencies.data_ptr()
    assert second.halved.data_ptr() != first.halved.data_ptr()
    assert second.head.weight is second.embedding.weight


def test_equal_tensors_of_one_module_stay_two() -> None:
    first, second = (torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.nn.ModuleList()
    for each in (*first, second):
        each.requires_grad_(False)
    with torch.no_grad():
        for layer in first:
            layer.weight.zero_()
            layer.bias.zero_()
    second.extend(
        [torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(3)],
    )
    second.load_state_dict({name: torch.zeros_like(t) for name, t in second.state_dict().items()})
    holder = MemoryFile()
    pair = torch.nn.ModuleList(first)
    assert holder.take(pair, lambda *_: None) == 2 * (16 + 4) * 4
    assert holder.take(second, lambda *_: None) == (16 + 4) * 4, "two of three are there"
    for module in (pair, second):
        places = [tensor.data_ptr() for tensor in module.state_dict().values()]
        assert len(set(places)) == len(places)


def test_a_tensor_that_lies_elsewhere_within_a_cache_line_is_kept_apart() -> None:
    """Kernels round by it, so that it has to stay where a plain load has it."""
    memory = torch.zeros(64)
    modules = [torch.nn.Linear(4, 1, bias=False) for _ in range(2)]
    for module, start in zip(modules, (16, 20), strict=True):
        module.weight.data = _own_storage(memory, start)
    phases = [module.weight.data_ptr() % 64 for module in modules]
    assert phases[0] != phases[1]
    holder = MemoryFile()
    assert [holder.take(module, lambda *_: None) for module in modules] == [16, 16]
    assert [module.weight.data_ptr() % 64 for module in modules] == phases


def test_a_private_copy_has_the_same_ties_views_and_values() -> None:
    torch.manual_seed(0)
    module = Odd()
    empty = torch.nn.Parameter(torch.empty(0, 3))
    module.register_parameter("empty", empty)
    holder = Private()
    taken = holder.take(module, lambda *_: None)
    before = {name: tensor.clone() for name, tensor in module.state_dict(keep_vars=True).items()}
    places = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    identities = {name: id(tensor) for name, tensor in module.named_parameters()}
    assert sizes([Spread.whole(module)])[0] == taken
    holder.open([Spread.whole(module)], [torch.device("cpu")])
    assert sizes([Spread.whole(module)])[0] == taken
    for name, tensor in module.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name])
        assert tensor.requires_grad == before[name].requires_grad
        assert tensor.numel() == 0 or tensor.data_ptr() != places[name]
    assert {name: id(tensor) for name, tensor in module.named_parameters()} == identities
    assert module.head.weight is module.embedding.weight
    assert module.original is module.frequencies
    frequencies, tail = module.frequencies, module.tail
    assert isinstance(frequencies, torch.Tensor)
    assert isinstance(tail, torch.Tensor)
    frequencies[2] = 40
    assert tail[0] == 40, "a view stays a view"
    assert not module.halved.requires_grad
    assert holder.settle(()) == Settled()


def test_a_private_copy_is_not_what_it_was_copied_from() -> None:
    module = torch.nn.Linear(4, 4)
    holder = Private()
    holder.take(module, lambda *_: None)
    kept = module.weight.detach()
    before = kept.clone()
    holder.open([Spread.whole(module)], [torch.device("cpu")])
    with torch.no_grad():
        module.weight.zero_()
    assert torch.equal(kept, before)


def test_what_two_modules_have_in_common_is_copied_once() -> None:
    torch.manual_seed(0)
    first, second = Odd(), Odd()
    second.load_state_dict(first.state_dict())
    second.halved.data += 1
    holder = Private()
    taken = sum(holder.take(each, lambda *_: None) for each in (first, second))
    assert sizes([Spread.whole(first), Spread.whole(second)])[0] == taken
    holder.open([Spread.whole(first), Spread.whole(second)], [torch.device("cpu")])
    assert sizes([Spread.whole(first), Spread.whole(second)])[0] == taken
    assert second.embedding.weight.data_ptr() == first.embedding.weight.data_ptr()
    assert second.halved.data_ptr() != first.halved.data_ptr()


def test_graphs_go_through_a_private_copy() -> None:
    """Also after a graph was made of the original."""
    module = torch.nn.Linear(3, 2)
    holder = Private()
    holder.take(module, lambda *_: None)
    module(torch.ones(3)).sum().backward()
    module.zero_grad()
    holder.open([Spread.whole(module)], [torch.device("cpu")])
    module(torch.ones(3)).sum().backward()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, torch.ones(2, 3))


def _own_storage(memory: torch.Tensor, start: int) -> torch.Tensor:
    """Four numbers from `start`, as a tensor with a storage of its own there."""
    raw = memoryview(memory.numpy()).cast("B")[start * 4 : start * 4 + 16]
    return torch.frombuffer(raw, dtype=torch.float32).view(1, 4)


def _is_weights(fd: Path) -> bool:
    try:
        return "memfd:weights" in str(fd.readlink())
    except FileNotFoundError:
        return False
