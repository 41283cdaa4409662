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

On a device there is no such mapping, so in the way called *private* each executor has a copy of its own there: it
opens the weights after its walls, storage by storage, in the same sense, from the same memory file.

Models of several tasks over one checkpoint are taken one after the other. A storage of a later one that
has the bytes of one in keeping, at the same place within a cache line, is put there and not kept twice:
names tell nothing, as each class has prefixes of its own. Within one model nothing is joined, however
equal: what were two tensors locally can be edited apart.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from edif_hpc.errors import EngineError

ALIGNMENT = 4096
CACHE_LINE = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


#: Of a storage: its size, its place within a cache line, how it begins.
_Mark = tuple[int, int, bytes]


class Holder(Protocol):
    """Keeps the weights of models for executors to use: taken in the zygote, opened in an executor, settled when that is gone."""

    def take(self, module: torch.nn.Module, progress: Callable[[int, int], None]) -> int:
        """Move the weights of `module` into keeping; return by how many bytes that is more than before."""
        ...

    def open(self, modules: Sequence[torch.nn.Module], device: torch.device) -> None:
        """Let the modules, in this executor, have their weights on `device`."""
        ...

    def settle(self) -> None:
        """Have the weights as they were taken, now that an executor is gone."""
        ...


class MemoryFile:
    """The holder for CPU: executors have what the zygote has."""

    def __init__(self) -> None:
        self._kept: dict[_Mark, list[memoryview]] = {}

    def take(self, module: torch.nn.Module, progress: Callable[[int, int], None]) -> int:
        """Move all parameters and buffers of `module`; call `progress(done, total)` on the way."""
        left = {mark: list(regions) for mark, regions in self._kept.items()}
        groups = [group for group in _by_storage(_tensors(module)) if not _point_into(left, group)]
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
                mark = _mark(group[0].untyped_storage())
                _write(fd, place, group[0].untyped_storage())
                _point_to(group, memory[place : place + size])
                self._kept.setdefault(mark, []).append(memory[place : place + size])
                start, done = start + _aligned(phase + size), done + size
                progress(done, total)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        finally:
            os.close(fd)
        return total

    def open(self, modules: Sequence[torch.nn.Module], device: torch.device) -> None:
        """The weights are there."""

    def settle(self) -> None:
        """What an executor wrote was its own, and went with it."""


class Private(MemoryFile):
    """The holder for a device of which every executor has a copy of the weights."""

    def open(self, modules: Sequence[torch.nn.Module], device: torch.device) -> None:
        """Copy each storage to `device`, once, and let its tensors be the same views there.

        Raises:
            EngineError: a tensor cannot be moved.
        """
        copies: dict[tuple[int, int], torch.UntypedStorage] = {}
        for module in modules:
            for group in _by_storage(_tensors(module)):
                storage = group[0].untyped_storage()
                place = _place(storage)
                if place not in copies:
                    copies[place] = _bytes(storage).to(device, copy=True).untyped_storage()
                _point(group, copies[place])
            _move_others(module, device)


def size(modules: Iterable[torch.nn.Module]) -> int:
    """Return how many bytes a copy of the weights takes; what several have in common counts once."""
    groups = (group for module in modules for group in _by_storage(_tensors(module)))
    places = {_place(group[0].untyped_storage()) for group in groups}
    return sum(nbytes for _, nbytes in places)


def _place(storage: torch.UntypedStorage) -> tuple[int, int]:
    return storage.data_ptr(), storage.nbytes()


def _move_others(module: torch.nn.Module, device: torch.device) -> None:
    """Move what has no storage of its own kind: tensors without elements, and special ones."""
    for tensor in _tensors(module):
        if tensor.device.type == device.type:
            continue
        try:
            tensor.data = tensor.data.to(device)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise EngineError(
                f"a {type(tensor).__name__} of the model cannot be moved to {device}: {error}; deploy the model unquantised"
            ) from error


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


def _mark(storage: torch.UntypedStorage) -> _Mark:
    return (
        storage.nbytes(),
        storage.data_ptr() % CACHE_LINE,
        _bytes(storage)[:CACHE_LINE].numpy().tobytes(),
    )


def _point_into(regions: dict[_Mark, list[memoryview]], tensors: list[torch.Tensor]) -> bool:
    """Let the tensors, which share a storage, use a region with the same bytes; take it from `regions`."""
    storage = tensors[0].untyped_storage()
    alike = regions.get(_mark(storage), [])
    for index, region in enumerate(alike):
        if torch.equal(torch.frombuffer(region, dtype=torch.uint8), _bytes(storage)):
            _point_to(tensors, alike.pop(index))
            return True
    return False


def _bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write(fd: int, start: int, storage: torch.UntypedStorage) -> None:
    """Copy a storage into the file, in pieces as large as the kernel takes."""
    content = memoryview(_bytes(storage).numpy().data)
    while content:
        written = os.pwrite(fd, content, start)
        content, start = content[written:], start + written


def _point_to(tensors: list[torch.Tensor], memory: memoryview) -> None:
    _point(tensors, torch.frombuffer(memory, dtype=torch.uint8).untyped_storage())


def _point(tensors: list[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Let each tensor, in place, be the same view as before on the new storage."""
    for tensor in tensors:
        moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
        moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
        tensor.data = moved
