"""Who says how much a request may use, and what it is told when that was not enough."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.limits import (
    NAMES,
    SAYS_NOTHING,
    Allowed,
    Limits,
    agreed,
    amount,
    checked,
    limits_of,
    overrun,
)
from edif_hpc.domain.request import FailureKind, kind_of
from edif_hpc.errors import InvalidInput

RELAY, TOKEN, DEPLOYMENT = "the relay", "the token ada", "the deployment gpt2"


def test_the_three_have_the_same_names() -> None:
    assert {each.name for each in fields(Limits)} == {*NAMES, "sources"}


@pytest.mark.parametrize(
    ("said", "value", "source"),
    [
        ({}, 10_000, None),
        ({RELAY: 50}, 50, RELAY),
        ({RELAY: 50, TOKEN: 40}, 40, TOKEN),
        ({RELAY: 50, TOKEN: 60}, 50, RELAY),
        ({TOKEN: 50, DEPLOYMENT: 20, RELAY: 60}, 20, DEPLOYMENT),
        ({TOKEN: 50, DEPLOYMENT: 50, RELAY: 50}, 50, TOKEN),
        ({TOKEN: None, DEPLOYMENT: 70, RELAY: None}, 70, DEPLOYMENT),
    ],
)
def test_the_lowest_counts(said: dict[str, Any], value: int, source: str | None) -> None:
    limits = agreed({name: Allowed(log_lines=each) for name, each in said.items()})
    assert (limits.log_lines, limits.sources.get("log_lines")) == (value, source)
    assert limits.memory_bytes == Limits().memory_bytes


def test_each_limit_has_its_own_source() -> None:
    limits = agreed(
        {
            TOKEN: Allowed(wall_s=5.0, gpu_memory_bytes=9),
            DEPLOYMENT: Allowed(wall_s=7.0, result_bytes=3),
        }
    )
    assert (limits.wall_s, limits.gpu_memory_bytes, limits.result_bytes) == (5.0, 9, 3)
    assert limits.sources == {
        "wall_s": TOKEN,
        "gpu_memory_bytes": TOKEN,
        "result_bytes": DEPLOYMENT,
    }


_ALLOWED = st.builds(
    Allowed,
    wall_s=st.none() | st.floats(0.5, 1e6),
    **{name: st.none() | st.integers(1, 1 << 50) for name in NAMES if name != "wall_s"},
)


@given(st.dictionaries(st.text(min_size=1), _ALLOWED, max_size=4))
def test_nothing_is_above_what_anybody_said(said: dict[str, Allowed]) -> None:
    limits = agreed(said)
    for allowed in said.values():
        for name, value in allowed.numbers().items():
            assert getattr(limits, name) <= value
            assert name in limits.sources
    assert limits_of(limits.numbers(), limits.sources) == limits


def test_what_travels_may_have_names_that_are_not_known_yet() -> None:
    limits = limits_of({"wall_s": 1, "newer": 2.0, "log_lines": 3.0}, {"newer": "x"})
    assert limits == Limits(wall_s=1.0, log_lines=3)
    assert type(limits.log_lines) is int


def test_limits_that_were_stored_before_there_were_more_of_them() -> None:
    stored = {
        "wall_s": 60.0, "memory_bytes": 1, "result_bytes": 2, "log_bytes": 3, "log_lines": 4,
    }  # fmt: skip
    old = Limits(**stored)  # type: ignore[arg-type]
    assert (old.saved_tensors, old.gpu_memory_bytes, dict(old.sources)) == (100_000, None, {})
    assert Limits(**asdict(old)) == old


@pytest.mark.parametrize("value", [0, -1, float("inf"), float("nan")])
def test_a_limit_that_nothing_could_keep(value: float) -> None:
    with pytest.raises(InvalidInput, match="wall_s"):
        checked(Allowed(wall_s=value))
    assert checked(SAYS_NOTHING) is SAYS_NOTHING


@pytest.mark.parametrize("name", NAMES)
def test_an_overrun_names_limit_value_source_and_remedy(name: str) -> None:
    limits = Limits(gpu_memory_bytes=5, sources={name: TOKEN})
    over = overrun(limits, name, "it happened", used=7)
    value = getattr(limits, name)
    assert str(over).startswith("it happened: its limit of ")
    assert f" is {amount(name, value)}, set by the token ada. " in str(over)
    assert str(over).endswith("or ask your operator for a higher limit.")
    assert over.details == {"limit": name, "value": value, "source": TOKEN, "used": 7}
    assert kind_of(over) is {
        "wall_s": FailureKind.TIMEOUT,
        "memory_bytes": FailureKind.OOM,
        "gpu_memory_bytes": FailureKind.OOM,
    }.get(name, FailureKind.LIMIT)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("wall_s", 90.5, "90.5 s"),
        ("memory_bytes", 8 << 30, "8 GiB"),
        ("memory_bytes", 3 << 29, "1.5 GiB"),
        ("log_bytes", 1000, "1000 bytes"),
        ("log_bytes", 2048, "2 KiB"),
        ("log_bytes", 100_000, "100 kB"),
        ("memory_bytes", 10**9, "1 GB"),
        ("memory_bytes", 1_500_000_000, "1.5 GB"),
        ("memory_bytes", 1_234_567_890, "1.15 GiB"),
        ("log_lines", 10_000, "10,000"),
        ("gpu_memory_bytes", None, "no limit"),
    ],
)
def test_values_for_people(name: str, value: float | None, text: str) -> None:
    assert amount(name, value) == text
