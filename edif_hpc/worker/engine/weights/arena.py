"""The memory of one device that all executors have the weights in, and how it is put right.

An *arena* is one piece of memory with all storages of the device in it: one handle opens it, and it is compared block by block,
whatever the sizes of the storages are. Where each lies is said by its *region*. What it has to be is in the memory files of
the zygote, which are sealed: nobody can change them, and an arena that was changed is restored from there, bit for bit.
"""

from __future__ import annotations

import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Final

import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.weights.fingerprint import BLOCK_BYTES, Fingerprint

#: Torch gives a smaller piece of a GPU's memory together with its neighbours, and the handle opens all of them.
GPU_LEAST_BYTES: Final = 10 * BLOCK_BYTES


@dataclass(frozen=True, kw_only=True, order=True)
class Region:
    """A storage: on which device, where in its arena, how large; and from where in which of the files it comes."""

    device: int
    place: int
    size: int
    file: int
    start: int

    @property
    def end(self) -> int:
        """Where in the arena it ends."""
        return self.place + self.size


def pack(regions: Iterable[Region]) -> bytes:
    """Regions as bytes, for a frame."""
    return array.array("Q", [number for each in regions for number in astuple(each)]).tobytes()


def unpack(packed: bytes) -> list[Region]:
    """Regions from what `pack` made."""
    numbers = iter(array.array("Q", packed))
    return [
        Region(device=device, place=place, size=size, file=file, start=start)
        for device, place, size, file, start in zip(*[numbers] * 5, strict=True)
    ]


def arena_bytes(regions: Sequence[Region], *, least: int = 0) -> int:
    """Return how large the arena of these regions is: whole blocks."""
    needed = max(least, max((each.end for each in regions), default=0), 1)
    return -(-needed // BLOCK_BYTES) * BLOCK_BYTES


class Arena:
    """The memory, filled; the holder alone has one of these."""

    def __init__(
        self, memory: torch.Tensor, regions: Sequence[Region], files: Sequence[torch.Tensor]
    ) -> None:
        """`memory` are bytes on the device, in whole blocks, and `files` those on the host."""
        self._blocks = memory.view(-1, BLOCK_BYTES)
        self._regions = sorted(regions)
        self._ends = [each.end for each in self._regions]
        self._files = files
        self._fingerprint = Fingerprint(memory.device)
        for number in range(len(self._blocks)):
            self._blocks[number].copy_(self._image(number))
        self._wanted = self._fingerprint.of(memory)

    def settle(self) -> int:
        """Restore what differs; return how many storages that were.

        Raises:
            EngineError: the device does not keep what is written.
        """
        changed = self._changed()
        restored = {region for number in changed for region in self._restore(number)}
        if changed and self._changed():
            raise EngineError(
                f"weights on {self._blocks.device} differ from the checkpoint after they were restored; the device is faulty"
            )
        return len(restored)

    def _changed(self) -> list[int]:
        now = self._fingerprint.of(self._blocks.view(-1))
        numbers: list[int] = (now != self._wanted).any(dim=1).nonzero().flatten().tolist()
        return numbers

    def _restore(self, number: int) -> list[Region]:
        """Restore a block; return the regions in it that differed."""
        block, right = self._blocks[number], self._image(number).to(self._blocks.device)
        begin = number * BLOCK_BYTES
        differed = []
        for region in self._within(number):
            first, last = max(region.place - begin, 0), min(region.end - begin, BLOCK_BYTES)
            if not torch.equal(block[first:last], right[first:last]):
                differed.append(region)
        block.copy_(right)
        return differed

    def _image(self, number: int) -> torch.Tensor:
        """What a block has to be."""
        image = torch.zeros(BLOCK_BYTES, dtype=torch.uint8)
        begin = number * BLOCK_BYTES
        for region in self._within(number):
            first, last = max(region.place, begin), min(region.end, begin + BLOCK_BYTES)
            start = region.start + first - region.place
            source = self._files[region.file][start : start + last - first]
            image[first - begin : last - begin].copy_(source)
        return image

    def _within(self, number: int) -> Iterable[Region]:
        """The regions that have a part in a block; they lie one after the other."""
        begin, end = number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES
        index = bisect_left(self._ends, begin + 1)
        while index < len(self._regions) and self._regions[index].place < end:
            yield self._regions[index]
            index += 1
