"""An adapter's one spelling, and each name once."""

from __future__ import annotations

import pytest

from edif_hpc.domain.adapter import Adapter, each_once
from edif_hpc.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "revision", "shown"),
    [
        ("lab/lora", None, "lab/lora"),
        ("lab/lora@main", None, "lab/lora"),
        ("lab/lora@c0ffee", "c0ffee", "lab/lora@c0ffee"),
        ("lab/lora@refs/pr/1", "refs/pr/1", "lab/lora@refs/pr/1"),
    ],
)
def test_an_adapter_is_written_as_it_is_read(text: str, revision: str | None, shown: str) -> None:
    adapter = Adapter.parse(text)
    assert adapter == Adapter(repo_id="lab/lora", revision=revision)
    assert str(adapter) == shown


@pytest.mark.parametrize("text", ["", "@c0ffee", "lab/lora@"])
def test_what_is_no_adapter(text: str) -> None:
    with pytest.raises(InvalidInput, match="ORG/NAME"):
        Adapter.parse(text)


def test_a_name_is_listed_once() -> None:
    listed = [Adapter(repo_id="a/b"), Adapter(repo_id="a/c", revision="v1")]
    assert each_once(listed) == tuple(listed)
    with pytest.raises(InvalidInput, match="'a/b' is listed twice"):
        each_once([*listed, Adapter(repo_id="a/b", revision="v2")])
