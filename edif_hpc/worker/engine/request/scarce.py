"""What is known when memory ran out: what was asked for, what was saved, and how much was lacking on which GPU.

It is gathered while the exception passes the place where nnsight still knows what was saved. A saved tensor's name is looked
for in the frames of the traceback, where the researcher's block keeps its variables; in a list or dict it has that one's name.

What a GPU lacked is read from torch's own sentence, since nothing else tells it.
"""

from __future__ import annotations

import errno
import gc
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch

from edif_hpc.domain.limits import Limits, overrun, size
from edif_hpc.errors import OverLimit
from edif_hpc.worker.engine.request.fidelity import chain
from edif_hpc.worker.engine.values import Plain

LARGEST: Final = 3
DEPTH: Final = 4
_UNITS: Final[Mapping[str, int]] = {
    "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40,
}  # fmt: skip
_SIZE: Final = r"([\d.]+) (bytes|[KMGT]iB)"
#: The CPU's allocator says "you tried to allocate 123 bytes", the GPU's "Tried to allocate 2.00 GiB".
_TRIED: Final = re.compile(rf"[Tt]ried to allocate {_SIZE}")
_GPU: Final = re.compile(rf"GPU (\d+) has a total capacity of {_SIZE} of which {_SIZE} is free")
_ALLOWED: Final = re.compile(rf"{_SIZE} allowed")
_TAKEN: Final = re.compile(rf"{_SIZE} is allocated by PyTorch, and {_SIZE} is reserved by PyTorch")


@dataclass(kw_only=True)
class Scarcity:
    """Takes note of an exception for want of memory, and tells what is known."""

    largest_saved: list[dict[str, Plain]] = field(default_factory=list)

    def note(self, error: BaseException, saved: set[int]) -> None:
        """Look at what is `saved`, by id, while the exception passes."""
        names = _names(error)
        found = {
            id(tensor): (tensor, names.get(id(holder)))
            for holder in gc.get_objects()
            if id(holder) in saved
            for tensor in _within(holder, DEPTH)
        }
        largest = sorted(found.values(), key=lambda each: each[0].nbytes, reverse=True)[:LARGEST]
        self.largest_saved = [_described(tensor, name) for tensor, name in largest]

    def meta(self, error: BaseException) -> dict[str, Plain]:
        """What `meta` tells of it."""
        lacked = shortfall(str(error))
        told: dict[str, Plain] = {"largest_saved": [*self.largest_saved]}
        return told | ({"alloc_shortfall_by_gpu": {**lacked}} if lacked else {})

    def text(self) -> str:
        """The largest saved tensors in words; empty if there are none."""
        if not self.largest_saved:
            return ""
        words = [
            f"{each['name'] or 'unnamed'} {each['dtype']} {each['shape']}, {size(int(str(each['bytes'])))}"
            for each in self.largest_saved
        ]
        return f"The largest saved tensors: {'; '.join(words)}."


def shortfall(said: str) -> dict[str, int]:
    """How many bytes were lacking on which GPU, as torch said; empty if it did not."""
    tried, gpu = _TRIED.search(said), _GPU.search(said)
    if tried is None or gpu is None:
        return {}
    free = _bytes(gpu, 4)
    allowed, taken = _ALLOWED.search(said), _TAKEN.search(said)
    if allowed is not None and taken is not None:
        free = min(free, _bytes(allowed, 1) - _bytes(taken, 1) - _bytes(taken, 3))
    return {gpu[1]: max(0, _bytes(tried, 1) - max(0, free))}


def lacks_disk(error: BaseException, *, own: bool) -> bool:
    """Whether an error says that there may be no more files; libraries that are not in Python say it in words.

    A file may be too large everywhere. That a file system is full is the request's affair if it has its `own`.
    """
    numbers = (errno.EFBIG, errno.ENOSPC) if own else (errno.EFBIG,)
    return any(
        getattr(each, "errno", None) == number or os.strerror(number) in str(each)
        for each in chain(error)
        for number in numbers
    )


def of_host(limits: Limits, error: BaseException, peak_bytes: int) -> OverLimit:
    """The error of a request that took more memory of the host than it may."""
    peak = f"{size(peak_bytes)} with the model"
    happened = f"the request ran out of memory{_asked(error)}, after a peak of {peak}"
    return overrun(limits, "memory_bytes", happened)


def of_gpu(limits: Limits, error: BaseException, total_bytes: int) -> OverLimit:
    """The error of a request that took more memory of a GPU than it may, or than there is."""
    if limits.gpu_memory_bytes is None:
        limits = replace(
            limits,
            gpu_memory_bytes=total_bytes,
            sources={**limits.sources, "gpu_memory_bytes": "the GPU itself, weights included"},
        )
    happened = f"the request ran out of GPU memory{_asked(error)}"
    return overrun(limits, "gpu_memory_bytes", happened)


def _asked(error: BaseException) -> str:
    tried = _TRIED.search(str(error))
    return f" (it asked for {size(_bytes(tried, 1))} at once)" if tried else ""


def _bytes(match: re.Match[str], group: int) -> int:
    return int(float(match[group]) * _UNITS[match[group + 1]])


def _names(error: BaseException) -> dict[int, str]:
    """The names under which the frames of the traceback hold things, by the ids of these."""
    named: dict[int, str] = {}
    for one in chain(error):
        for traceback in (one.__traceback__, getattr(one, "__intervention_tb__", None)):
            step = traceback
            while step is not None:
                named |= {id(value): name for name, value in step.tb_frame.f_locals.items()}
                step = step.tb_next
    return named


def _within(holder: Any, depth: int) -> Iterator[torch.Tensor]:
    if isinstance(holder, torch.Tensor):
        yield holder
    elif depth > 0 and isinstance(holder, list | tuple | set | dict):
        items: Iterable[Any] = holder.values() if isinstance(holder, dict) else holder
        for each in items:
            yield from _within(each, depth - 1)


def _described(tensor: torch.Tensor, name: str | None) -> dict[str, Plain]:
    return {
        "name": name,
        "shape": [*tensor.shape],
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": str(tensor.device),
        "bytes": tensor.nbytes,
    }
