"""Which names of the block go home.

Those whose values were saved, as nnsight has it. Besides, what the block did to a container of the researcher's, since
`acts.append(x.save())` and `losses.append(loss.item())` work locally, and the client knows no way to see them but a name:

* a container that holds something saved comes back, whole;
* one that was captured and changed comes back if it holds nothing but data. Tensors that are new in it must be saved: what
  comes home over a network is the researcher's to say.

The client binds names, in the frame of its `with`. So what is saved into an attribute, or into a global of a script from within a
function, finds no way home; `stranded` tells, and the researcher is told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from nnsight.intervention.envoy import Envoy

DEPTH = 4
#: Looking costs time, twice; a container that holds more is not looked at.
MOST_ITEMS = 10_000

_CONTAINERS = (list, tuple, set, frozenset, dict, deque)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_ARRAYS = (torch.Tensor, np.ndarray)
_NOT_OURS = (Envoy, torch.nn.Module, torch.Tensor, ModuleType, FunctionType, MethodType, type)


@dataclass(frozen=True, kw_only=True)
class Before:
    """A captured container and what it held before the block."""

    container: Any
    contents: list[Any]


def before(scope: Mapping[str, Any]) -> dict[str, Before]:
    """Return what the containers of `scope` hold that hold nothing but data, and not too much."""
    found = {
        name: _contents(each) for name, each in scope.items() if isinstance(each, _CONTAINERS)
    }
    return {
        name: Before(container=scope[name], contents=contents)
        for name, contents in found.items()
        if contents is not None
    }


def collect(
    scope: Mapping[str, Any], saved: set[int], captured: Mapping[str, Before]
) -> dict[str, Any]:
    """Return the entries of `scope` that go home."""
    return {
        name: value
        for name, value in scope.items()
        if _holds(value, saved) or (name in captured and _changed(value, captured[name], saved))
    }


def stranded(scope: Mapping[str, Any], outer: Mapping[str, Any], saved: set[int]) -> list[str]:
    """Return where something was saved to that does not go home: attributes, and names of `outer`.

    Numbers and words do not count: one that was saved is the same object wherever else it stands.
    """

    def lost(value: Any) -> bool:
        return any(not isinstance(each, _PLAIN) for each in _saved(value, saved, DEPTH))

    attributes = [
        f"{name}.{attribute}"
        for name, value in chain(scope.items(), outer.items())
        if id(value) not in saved and not isinstance(value, _NOT_OURS)
        for attribute, held in getattr(value, "__dict__", {}).items()
        if lost(held)
    ]
    return [*attributes, *(name for name, value in outer.items() if lost(value))]


def _holds(value: Any, saved: set[int]) -> bool:
    return any(True for _ in _saved(value, saved, DEPTH))


def _saved(value: Any, saved: set[int], depth: int) -> Iterator[Any]:
    """Yield what was saved of a value and of what it holds."""
    if id(value) in saved:
        yield value
    elif depth > 0 and isinstance(value, _CONTAINERS):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _saved(item, saved, depth - 1)


def _changed(value: Any, captured: Before, saved: set[int]) -> bool:
    if value is not captured.container:
        return False
    now = _contents(value)
    if now is None or _same(now, captured.contents):
        return False
    known = {id(each) for each in captured.contents} | saved
    return all(id(each) in known for each in now if isinstance(each, _ARRAYS))


def _same(now: list[Any], then: list[Any]) -> bool:
    return len(now) == len(then) and all(
        one is other or (isinstance(one, _PLAIN) and type(one) is type(other) and one == other)
        for one, other in zip(now, then, strict=True)
    )


def _contents(container: Any) -> list[Any] | None:
    """Return all that a container holds, in order, however deep; None if that is not only data, or too much."""
    found: list[Any] = []
    return found if _gather(container, found, DEPTH) else None


def _gather(container: Any, found: list[Any], depth: int) -> bool:
    items: Iterable[Any] = container
    if isinstance(container, dict):
        items = chain.from_iterable(container.items())
    for each in items:
        found.append(each)
        if len(found) > MOST_ITEMS:
            return False
        if isinstance(each, _CONTAINERS):
            if depth == 1 or not _gather(each, found, depth - 1):
                return False
        elif not isinstance(each, (*_PLAIN, *_ARRAYS)):
            return False
    return True
