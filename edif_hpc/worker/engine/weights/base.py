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

On a device there is no such mapping. In the way called *private* each executor has a copy of its own there: it opens the
weights after its walls, storage by storage, in the same sense, from the same memory file. In the way called *shared* (`shared`)
they lie there once, and the memory file is what they are compared with.

Models of several tasks over one checkpoint are taken one after the other. A storage of a later one that
has the bytes of one in keeping, at the same place within a cache line, is put there and not kept twice:
names tell nothing, as each class has prefixes of its own. Within one model nothing is joined, however
equal: what were two tensors locally can be edited apart.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.messages import Settled

ALIGNMENT = 4096
CACHE_LINE = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


#: Of a storage: its size, its place within a cache line, how it begins.
_Mark = tuple[int, int, bytes]


@dataclass(frozen=True, kw_only=True)
class Group:
    """The tensors of a module that share a storage, and the name of the first."""

    name: str
    tensors: list[torch.Tensor]

    @property
    def storage(self) -> torch.UntypedStorage:
        """What they share."""
        return self.tensors[0].untyped_storage()

    def point(self, storage: torch.UntypedStorage) -> None:
        """Let each tensor, in place, be the same view as before on another storage."""
        for tensor in self.tensors:
            moved = torch.empty(0, dtype=tensor.dtype, device=storage.device)
            moved.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())
            tensor.data = moved


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A module, and on which of several devices each of its tensors is, by name."""

    module: torch.nn.Module
    index_of: Callable[[str], int]

    @classmethod
    def whole(cls, module: torch.nn.Module) -> Spread:
        """All on the first."""
        return cls(module=module, index_of=lambda _: 0)


class Holder(Protocol):
    """Keeps the weights of models for executors to use: taken in the zygote, opened in an executor, settled when that is gone."""

    #: What it is called where it matters: on a device.
    way: str
    #: Whether each executor that opens them takes as much of the device's memory.
    copies: bool

    def take(self, module: torch.nn.Module, progress: Callable[[int, int], None]) -> int:
        """Move the weights of `module` into keeping; return by how many bytes that is more than before."""
        ...

    def open(self, spreads: Sequence[Spread], devices: Sequence[torch.device]) -> None:
        """Let the modules, in this executor, have their weights where they are computed with."""
        ...

    def settle(self, free_bytes: Sequence[int]) -> Settled:
        """Have the weights as they were taken, now that an executor is gone.

        `free_bytes` is what the first executor found free on each device.
        """
        ...

    def fileno(self) -> int:
        """Return a descriptor that has something to read when the weights are lost; -1 if they cannot be."""
        ...

    def ended(self) -> EngineError:
        """Return why they are."""
        ...


class MemoryFile:
    """The holder for CPU: executors have what the zygote has."""

    way = "mapped"
    copies = False

    def __init__(self) -> None:
        self._kept: dict[_Mark, list[memoryview]] = {}

    def take(self, module: torch.nn.Module, progress: Callable[[int, int], None]) -> int:
        """Move all parameters and buffers of `module`; call `progress(done, total)` on the way."""
        left = {mark: list(regions) for mark, regions in self._kept.items()}
        groups = [each for each in grouped(module) if not _point_into(left, each)]
        sizes = [group.storage.nbytes() for group in groups]
        phases = [group.storage.data_ptr() % CACHE_LINE for group in groups]
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
                mark = _mark(group.storage)
                _write(fd, place, group.storage)
                group.point(storage_in(memory[place : place + size]))
                self._kept.setdefault(mark, []).append(memory[place : place + size])
                start, done = start + _aligned(phase + size), done + size
                progress(done, total)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            self.sealed(fd, memory)
        finally:
            os.close(fd)
        return total

    def sealed(self, fd: int, memory: memoryview) -> None:
        """A file is complete; it is closed after this."""

    def open(self, spreads: Sequence[Spread], devices: Sequence[torch.device]) -> None:
        """The weights are there."""

    def settle(self, free_bytes: Sequence[int]) -> Settled:  # noqa: ARG002 - nothing was shared
        """What an executor wrote was its own, and went with it."""
        return Settled()

    def fileno(self) -> int:
        """Memory of our own is not lost."""
        return -1

    def ended(self) -> EngineError:
        """Nobody asks."""
        return EngineError("weights in memory of our own do not end")


class Private(MemoryFile):
    """The holder for devices of which every executor has a copy of the weights."""

    way = "private"
    copies = True

    def open(self, spreads: Sequence[Spread], devices: Sequence[torch.device]) -> None:
        """Copy each storage to its device, once, and let its tensors be the same views there.

        Raises:
            EngineError: a tensor cannot be moved.
        """
        copies: dict[tuple[int, int], torch.UntypedStorage] = {}
        for spread in spreads:
            for group in grouped(spread.module):
                place = _place(group.storage)
                if place not in copies:
                    device = devices[spread.index_of(group.name)]
                    copies[place] = as_bytes(group.storage).to(device, copy=True).untyped_storage()
                group.point(copies[place])
            move_others(spread, devices)


def sizes(spreads: Iterable[Spread]) -> Mapping[int, int]:
    """Return how many bytes a copy of the weights takes of each device; what several have in common counts once."""
    seen: set[tuple[int, int]] = set()
    total: dict[int, int] = {}
    for spread in spreads:
        for group in grouped(spread.module):
            place = _place(group.storage)
            if place not in seen:
                seen.add(place)
                index = spread.index_of(group.name)
                total[index] = total.get(index, 0) + place[1]
    return total


def grouped(module: torch.nn.Module) -> list[Group]:
    """Return the storages that can be moved, with the tensors that share each."""
    groups: dict[int, Group] = {}
    for name, tensor in _tensors(module):
        if _movable(tensor):
            fresh = Group(name=name, tensors=[])
            groups.setdefault(tensor.untyped_storage().data_ptr(), fresh).tensors.append(tensor)
    return list(groups.values())


def move_others(spread: Spread, devices: Sequence[torch.device]) -> None:
    """Move what has no storage of its own kind: tensors without elements, and special ones.

    Raises:
        EngineError: one cannot be moved.
    """
    for name, tensor in _tensors(spread.module):
        device = devices[spread.index_of(name)]
        if tensor.device.type == device.type:
            continue
        try:
            tensor.data = tensor.data.to(device)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            raise EngineError(
                f"a {type(tensor).__name__} of the model cannot be moved to {device}: {error}; deploy the model unquantised"
            ) from error


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a storage as a tensor of its bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def storage_in(memory: memoryview) -> torch.UntypedStorage:
    """Return a storage of the host that lies in `memory`."""
    return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()


def _place(storage: torch.UntypedStorage) -> tuple[int, int]:
    return storage.data_ptr(), storage.nbytes()


def _tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer once, also the buffers that no checkpoint holds."""
    yield from module.named_parameters()
    yield from module.named_buffers()


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
        as_bytes(storage)[:CACHE_LINE].numpy().tobytes(),
    )


def _point_into(regions: dict[_Mark, list[memoryview]], group: Group) -> bool:
    """Let the tensors use a region with the same bytes; take it from `regions`."""
    alike = regions.get(_mark(group.storage), [])
    for index, region in enumerate(alike):
        if torch.equal(torch.frombuffer(region, dtype=torch.uint8), as_bytes(group.storage)):
            group.point(storage_in(alike.pop(index)))
            return True
    return False


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _write(fd: int, start: int, storage: torch.UntypedStorage) -> None:
    """Copy a storage into the file, in pieces as large as the kernel takes."""
    content = memoryview(as_bytes(storage).numpy().data)
    while content:
        written = os.pwrite(fd, content, start)
        content, start = content[written:], start + written
