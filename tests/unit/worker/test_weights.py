"""Moving weights changes where they lie and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from edif_hpc.worker.engine.weights import MemoryFile


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


def _is_weights(fd: Path) -> bool:
    try:
        return "memfd:weights" in str(fd.readlink())
    except FileNotFoundError:
        return False
