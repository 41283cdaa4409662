"""A fingerprint sees every change, and an arena is restored from its files bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.weights.arena import Arena, Region, arena_bytes, pack, unpack
from edif_hpc.worker.engine.weights.fingerprint import BLOCK_BYTES, Fingerprint

CPU = torch.device("cpu")
WORDS = BLOCK_BYTES // 4
#: What a sum, or keys that are odd, or words of 64 bits, would let pass.
TRICKS = {
    "two numbers of equal sum change places": {10: 5, 20: 7},
    "one bit": {0: 1 << 31},
    "the highest bit of two words": {1: 1 << 31, 3: 1 << 31},
    "the highest bit of two long words": {1: 1 << 31, 9: 1 << 31},
    "one more here, one less there": {4: 101, WORDS - 1: 99},
    "the last": {WORDS - 1: 1},
}


@pytest.fixture(scope="module")
def fingerprint() -> Fingerprint:
    return Fingerprint(CPU)


def block(words: dict[int, int]) -> torch.Tensor:
    memory = torch.zeros(WORDS, dtype=torch.int64)
    for index, value in words.items():
        memory[index] = value
    return memory.to(torch.int32).view(torch.uint8)


@pytest.mark.parametrize("name", TRICKS)
def test_a_change_is_seen(fingerprint: Fingerprint, name: str) -> None:
    changed = TRICKS[name]
    before = {10: 7, 20: 5, 4: 100, WORDS - 1: 100} if "sum" in name or "more" in name else {}
    assert not torch.equal(fingerprint.of(block(before)), fingerprint.of(block(before | changed)))


@settings(deadline=None, max_examples=15)
@given(
    before=st.dictionaries(
        st.integers(0, WORDS - 1), st.integers(-(2**31), 2**31 - 1), max_size=4
    ),
    after=st.dictionaries(st.integers(0, WORDS - 1), st.integers(-(2**31), 2**31 - 1), max_size=4),
)
def test_equal_fingerprints_are_equal_bytes(
    fingerprint: Fingerprint, before: dict[int, int], after: dict[int, int]
) -> None:
    one, other = block(before), block(after)
    same = torch.equal(fingerprint.of(one), fingerprint.of(other))
    assert same == torch.equal(one, other)


def test_keys_are_of_a_place_and_of_a_process() -> None:
    memory = torch.cat([block({0: 1, 1: 1}), block({0: 1, 1: 1})])
    one, other = Fingerprint(CPU), Fingerprint(CPU)
    assert torch.equal(one.of(memory)[0], one.of(memory)[1]), "blocks are compared by themselves"
    assert not torch.equal(one.of(block({0: 1})), one.of(block({1: 1})))
    assert not torch.equal(one.of(memory), other.of(memory))


def filled() -> tuple[Arena, torch.Tensor, list[Region]]:
    """An arena of three blocks: a storage over two of them, small ones around it, from two files."""
    files = [
        torch.randint(0, 256, (3 * BLOCK_BYTES,), dtype=torch.uint8),
        torch.randint(0, 256, (8192,), dtype=torch.uint8),
    ]
    regions = [
        Region(device=0, place=64, size=1000, file=1, start=4096 + 64),
        Region(device=0, place=4096, size=BLOCK_BYTES + 12, file=0, start=0),
        Region(device=0, place=2 * BLOCK_BYTES, size=20, file=0, start=2 * BLOCK_BYTES),
    ]
    memory = torch.empty(arena_bytes(regions), dtype=torch.uint8).random_(0, 256)
    arena = Arena(memory, regions[::-1], files)
    for each in regions:
        here, there = memory[each.place : each.end], files[each.file][each.start :][: each.size]
        assert torch.equal(here, there)
    return arena, memory, regions


def test_what_differs_is_restored_and_counted_by_storages() -> None:
    arena, memory, regions = filled()
    right = memory.clone()
    assert arena.settle() == 0
    memory[70] += 1
    assert arena.settle() == 1
    memory[regions[1].place] += 1
    memory[regions[1].end - 1] += 1
    assert arena.settle() == 1, "one storage in two blocks"
    memory.zero_()
    assert arena.settle() == 3
    memory[0] = 9
    assert arena.settle() == 0, "between storages"
    assert torch.equal(memory, right)


def test_a_device_that_does_not_keep_what_is_written_is_told() -> None:
    class Broken(Arena):
        def _restore(self, number: int) -> list[Region]:  # noqa: ARG002 - it does nothing
            return self._regions[:1]

    _, memory, regions = filled()
    broken = Broken(memory, regions, [memory.clone(), memory.clone()])
    memory[70] += 1
    with pytest.raises(EngineError, match="differ from the checkpoint after they were restored"):
        broken.settle()


def test_an_arena_is_whole_blocks() -> None:
    assert arena_bytes([]) == BLOCK_BYTES
    region = Region(device=0, place=BLOCK_BYTES, size=1, file=0, start=0)
    assert arena_bytes([region]) == 2 * BLOCK_BYTES
    assert arena_bytes([region], least=10 * BLOCK_BYTES) == 10 * BLOCK_BYTES


def test_regions_travel() -> None:
    _, _, regions = filled()
    assert unpack(pack(regions)) == regions
