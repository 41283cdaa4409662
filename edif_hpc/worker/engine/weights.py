"""Weights in a file that exists only in memory, mapped privately.

Forking a process copies the page tables of its anonymous memory, and its end takes them down again:
for a model in ordinary memory both cost in proportion to the model. A private mapping of a file costs
neither, whatever its size, and every executor reads the same physical pages. What an executor writes
is its own copy and gone with it. The file is sealed before the first fork, so nobody can write to it by
another way.

Parameters and buffers are moved by *storage*: what was tied stays tied, a view stays a view, and each
tensor keeps its identity, so that a module or a plain attribute that refers to it sees no difference.
It also keeps its place within a cache line: matrix kernels choose their path, and so their rounding, by
it, and the numbers have to be those of a plain load (which maps a checkpoint at whatever offset it has).
A tensor of a special kind (quantised, on another device) stays where it is: it is private after the
fork like any other memory, and only costs more.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

ALIGNMENT = 4096
CACHE_LINE = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class Holder(Protocol):
    """Keeps a model's weights for executors to use."""

    def take(self, module: torch.nn.Module, progress: Callable[[int, int], None]) -> int:
        """Move the weights of `module` into keeping; return their bytes."""
        ...


class MemoryFile:
    """The holder for CPU."""

    def take(self, module: torch.nn.Module, progress: Callable[[int, int], None]) -> int:
        """Move all parameters and buffers of `module`; call `progress(done, total)` on the way."""
        groups = _by_storage(_tensors(module))
        sizes = [group[0].untyped_storage().nbytes() for group in groups]
        phases = [group[0].untyped_storage().data_ptr() % CACHE_LINE for group in groups]
        total = sum(sizes)
        if not total:
            return 0
        fd = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, sum(map(_aligned, map(sum, zip(phases, sizes, strict=True)))))
            flags, access = mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
            memory = memoryview(mmap.mmap(fd, 0, flags=flags, prot=access))
            start = done = 0
            for group, phase, size in zip(groups, phases, sizes, strict=True):
                place = start + phase
                _write(fd, place, group[0].untyped_storage())
                _point(group, memory[place : place + size])
                start, done = start + _aligned(phase + size), done + size
                progress(done, total)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        finally:
            os.close(fd)
        return total


def _tensors(module: torch.nn.Module) -> Iterable[torch.Tensor]:
    """Yield every parameter and buffer once, also the buffers that no checkpoint holds."""
    yield from module.parameters()
    yield from module.buffers()


def _by_storage(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        if _movable(tensor):
            groups.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)
    return list(groups.values())


def _movable(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in {torch.Tensor, torch.nn.Parameter}
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.untyped_storage().nbytes() > 0
    )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write(fd: int, start: int, storage: torch.UntypedStorage) -> None:
    """Copy a storage into the file, in pieces as large as the kernel takes."""
    content = memoryview(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
    while content:
        written = os.pwrite(fd, content, start)
        content, start = content[written:], start + written


def _point(tensors: list[torch.Tensor], memory: memoryview) -> None:
    """Let each tensor, in place, be the same view as before on the new memory."""
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    for tensor in tensors:
        moved = torch.empty(0, dtype=tensor.dtype)
        moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        tensor.data = moved
