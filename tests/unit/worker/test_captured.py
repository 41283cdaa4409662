"""Which names go home."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from edif_hpc.worker.engine.request.captured import MOST_ITEMS, before, collect, stranded


def test_containers_that_hold_something_saved_come_along() -> None:
    value, other = object(), object()
    scope = {
        "itself": value,
        "listed": [1, value],
        "tupled": (value,),
        "queued": deque([value]),
        "named": {"a": {"b": value}},
        "deep": [[[[value]]]],
        "too deep": [[[[[value]]]]],
        "other": other,
        "others": [other],
    }
    found = collect(scope, {id(value)}, {})
    assert found.keys() == {"itself", "listed", "tupled", "queued", "named", "deep"}


def changed(captured: Any, **saved: Any) -> bool:
    """Whether a captured container goes home; `change` is what the block does to it."""
    scope = {"it": captured}
    known = before(scope)
    saved["change"](captured)
    return bool(collect(scope, set(), known))


@pytest.mark.parametrize(
    ("captured", "change"),
    [
        ([], lambda it: it.append(1.5)),
        ([1, 2], lambda it: it.reverse()),
        ([1], lambda it: it.clear()),
        ({"a": [1]}, lambda it: it["a"].append("b")),
        ({"a": 1}, lambda it: it.update(a=True)),
        (set(), lambda it: it.add("x")),
        (deque(), lambda it: it.append(np.float32(2))),
        ([torch.ones(1)], lambda it: it.append(1)),
        ([torch.ones(1), 1], lambda it: it.pop(0)),
    ],
)
def test_a_change_is_seen(captured: Any, change: Any) -> None:
    assert changed(captured, change=change)


@pytest.mark.parametrize(
    ("captured", "change"),
    [
        ([1, "a", None, float("nan"), torch.ones(1)], lambda _: None),
        ([], lambda it: it.append(torch.ones(1))),
        ([], lambda it: it.append(object())),
        ([object()], lambda it: it.append(1)),
        ([[[[[1]]]]], lambda it: it.append(1)),
        ([0] * (MOST_ITEMS + 1), lambda it: it.append(1)),
    ],
)
def test_what_is_unchanged_or_no_data_stays(captured: Any, change: Any) -> None:
    assert not changed(captured, change=change)


def test_another_value_under_a_captured_name_must_be_saved() -> None:
    known = before({"it": [1]})
    assert collect({"it": [1, 2]}, set(), known) == {}


def test_a_container_that_holds_itself_is_no_trouble() -> None:
    it: list[Any] = [1]
    it.append(it)
    assert before({"it": it}) == {}


def test_where_something_is_lost() -> None:
    value, number = [0], 10**9
    inner = {
        "box": SimpleNamespace(items=[value], count=number),
        "kept": value,
        "module": torch.nn.Linear(1, 1),
    }
    outer = {"RESULTS": [value], "number": number}
    assert stranded(inner, outer, {id(value), id(number)}) == ["box.items", "RESULTS"]
    assert stranded({"box": inner["box"]}, {}, {id(value), id(inner["box"])}) == []
