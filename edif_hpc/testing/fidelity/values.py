"""Values as they can be compared between processes: exactly, down to the last bit.

A run turns what a block bound into a *shown* value: tensors with dtype, shape and bytes; containers of shown values; plain
values as they are; of anything else only the name of its type, since an open file or a model has no bits to compare. Then
`difference` walks two of them and names the first place where they part.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any, Final

import torch

DEPTH: Final = 12
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def shown(value: Any, depth: int = DEPTH) -> Any:
    """The comparable form of a value."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return _tensor(value)
    if type(value) in _PLAIN:
        return value
    children = None if depth == 0 else _children(value)
    if children is None:
        return {"type": kind}
    return {"type": kind, "holds": {str(key): shown(each, depth - 1) for key, each in children}}


def _tensor(value: torch.Tensor) -> Any:
    facts = {"type": "Tensor", "dtype": str(value.dtype), "shape": tuple(value.shape)}
    if value.is_meta or type(value).__name__ == "FakeTensor":
        return facts
    flat = value.detach().cpu().contiguous().reshape(-1)
    return facts | {"bits": flat.view(torch.uint8).numpy().tobytes()}


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """What a container holds, or None if it is none."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    elif type(value).__name__ == "CacheView":
        value = value._cache.entries  # noqa: SLF001 - what was recorded, by path
    elif is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, list | tuple) else None


def difference(one: Any, other: Any) -> str:
    """Where two shown values part first and how, or nothing."""
    if isinstance(one, dict) and isinstance(other, dict):
        return _of_dicts(one, other)
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return "" if math.isnan(other) else f"{one} and {other}"
    if type(one) is not type(other) or one != other:
        return f"{_brief(one)} and {_brief(other)}"
    return ""


def _of_dicts(one: dict[str, Any], other: dict[str, Any]) -> str:
    for fact in ("type", "dtype", "shape"):
        if one.get(fact) != other.get(fact):
            return f"{fact} {one.get(fact)} and {other.get(fact)}"
    if one.get("bits") != other.get("bits"):
        return f"other bits in {one['dtype']}{list(one['shape'])}"
    mine, theirs = one.get("holds", {}), other.get("holds", {})
    for key, partner in zip_longest(mine, theirs):
        if key != partner:
            return f"entry {_brief(key)} and {_brief(partner)}"
        if found := difference(mine[key], theirs[key]):
            return f"[{key}] {found}"
    return ""


def _brief(value: Any) -> str:
    text = value["type"] if isinstance(value, dict) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
