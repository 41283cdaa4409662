"""Whether a model fits into this allocation, before hours of loading end in a kill without a word.

How large it becomes is read from the headers of its files, and how much memory there is from the control groups, where a
scheduler sets what a job may have, and from the kernel. Only what cannot fit is refused: what requests need comes on top, and
is told apart when they fail.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.walls import cgroup

_ITEM_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
_STORED_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
_HEADER_MOST = 100 << 20  # safetensors' own limit
GB = 1e9


def check(folder: Path, *, dtype: str, free: int | None) -> None:
    """Refuse a checkpoint whose weights alone are larger than the memory that is free.

    Raises:
        EngineError: it does not fit; the message says how much is asked and how much there is.
    """
    needed = weights_bytes(folder, dtype=dtype)
    if free is not None and needed > free:
        kept = "they are stored" if dtype == "auto" else dtype
        raise EngineError(
            f"the model is too large for this allocation: its weights take {needed / GB:.1f} GB as {kept}, and "
            f"{free / GB:.1f} GB of memory are free; give it more (mem_gb of the site's GPU, or --gpus), or deploy it with a "
            "smaller --dtype"
        )


def check_device(needed: int, *, free: int, total: int) -> None:
    """Refuse weights that are larger than the memory of a GPU that is free.

    Raises:
        EngineError: they do not fit; the message says how much is asked and how much there is.
    """
    if needed > free:
        raise EngineError(
            f"the model is too large for this GPU: its weights take {needed / GB:.1f} GB, and {free / GB:.1f} GB of its "
            f"{total / GB:.1f} GB are free; deploy it on a kind of GPU with more memory (--gpu), or with a smaller --dtype"
        )


def weights_bytes(folder: Path, *, dtype: str) -> int:
    """Return how large the weights in a folder become in a dtype; "auto" keeps them as they are stored.

    Files that are not safetensors count with their own size.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return sum(each.stat().st_size for each in folder.glob("*.bin"))
    item = _ITEM_BYTES.get(dtype)
    return sum(_tensor_bytes(each, item) for file in files for each in _header(file))


def free_bytes(
    groups: Iterable[Path] | None = None, meminfo: Path = Path("/proc/meminfo")
) -> int | None:
    """Return how much memory this process may still take; None if nothing tells."""
    known = [_free_in(each) for each in (cgroup.memory_groups() if groups is None else groups)]
    available = (
        line.split() for line in cgroup.lines(meminfo) if line.startswith("MemAvailable:")
    )
    known += [int(kib) * 1024 for _, kib, _ in available]
    return min((each for each in known if each is not None), default=None)


def _free_in(group: Path) -> int | None:
    """What is left of a group's limit; file pages that the kernel may drop count as free."""
    for limit_file, used_file, label in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit, used = cgroup.number(group / limit_file), cgroup.number(group / used_file)
        if limit is not None and used is not None:
            return max(0, limit - used + (cgroup.number(group / "memory.stat", label) or 0))
    return None


def _header(file: Path) -> list[dict[str, Any]]:
    """Return what a safetensors file says of its tensors (https://huggingface.co/docs/safetensors)."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > _HEADER_MOST:
            raise EngineError(
                f"{file.name} is no safetensors file: its header would have {length} bytes"
            )
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise EngineError(f"{file.name} is no safetensors file: {error}") from error
    return [facts for name, facts in header.items() if name != "__metadata__"]


def _tensor_bytes(facts: dict[str, Any], item: int | None) -> int:
    begin, end = facts["data_offsets"]
    stored = _STORED_BYTES.get(facts["dtype"])
    if item is None or stored is None:  # whole numbers stay as they are
        return int(end - begin)
    return int(math.prod(facts["shape"])) * item
