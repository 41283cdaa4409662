"""Whether memory is still what it was: a keyed fingerprint of each of its blocks.

Who may write to the weights may try to change them unseen, so a checksum will not do: of a plain sum, two swapped numbers
are no change. Here each 32-bit word of a block is multiplied by a random 64-bit key of its place, and the products are added,
modulo 2^64 (multilinear hashing; Lemire and Kaser, "Strongly universal string hashing is fast", The Computer Journal 57:11,
2014). The keys come from the operating system and never leave the process that holds them, nor does a fingerprint.

How likely is it that a change stays unseen? Let a word differ by d, which is not 0 and smaller than 2^32: an odd number times
2^t, t < 32. As its key takes all its values, key * d takes each multiple of 2^t equally often, so whatever the other words add
up to, at most one key in 2^(64-t) hides the change: no more than 2^-33, whatever is written, since it is written without knowing
the keys. Two sums with keys of their own make it 2^-66 for a block. It is by 32-bit words because of that t: with words of 64
bits, two flips of a highest bit would cancel each other for half of all keys.

Torch's integers wrap around modulo 2^64 on every device, and whole numbers add up to the same in any order.
"""

from __future__ import annotations

import os
from typing import Final

import torch

BLOCK_BYTES: Final = 2 << 20
_WORDS: Final = BLOCK_BYTES // 4
_LANES: Final = 2
#: So many blocks at once: what is between takes twice their size for a moment.
_AT_ONCE: Final = 8


class Fingerprint:
    """Random keys on one device."""

    def __init__(self, device: torch.device) -> None:
        drawn = bytearray(os.urandom(_LANES * _WORDS * 8))
        keys = torch.frombuffer(drawn, dtype=torch.int64).view(_LANES, _WORDS)
        self._keys = keys.to(device, copy=True)

    def of(self, memory: torch.Tensor) -> torch.Tensor:
        """Return the fingerprint of each block of `memory`, bytes in whole blocks: a row of numbers for each."""
        blocks = memory.view(torch.int32).view(-1, _WORDS)
        rows = [
            torch.stack([torch.mul(some, keys).sum(dim=1) for keys in self._keys], dim=1)
            for some in torch.split(blocks, _AT_ONCE)
        ]
        return torch.cat(rows)
