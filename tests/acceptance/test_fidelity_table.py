"""What nnsight documents does remotely what it does locally: every block, through a relay and a worker."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edif_hpc.testing.absent import absent
from edif_hpc.testing.debian import PartMissing
from edif_hpc.testing.fidelity import forms, needs, runner, work
from edif_hpc.testing.fidelity.corpus import archive, parse
from edif_hpc.testing.fidelity.runner import Outcome
from edif_hpc.testing.fidelity.table import Row, Verdict, counts, page, parting
from edif_hpc.testing.fidelity.values import difference, shown

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "fidelity.md"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    try:
        archive()
    except PartMissing as missing:
        absent(str(missing))
    return work.table(tmp_path_factory.mktemp("fidelity"))


def test_no_block_is_lost(table: list[Row]) -> None:
    assert counts(table) == {
        "found": 183,
        "run": 175,
        "equal": 156,
        "answered": 8,
        "different": 11,
    }


def test_the_page_is_what_the_blocks_do(table: list[Row]) -> None:
    assert PAGE.read_text().splitlines() == page(table).splitlines(), "run scripts/docs-fidelity"


def test_every_difference_and_every_omission_has_a_reason(table: list[Row]) -> None:
    known = needs.read()
    bare = [
        row.block.id
        for row in table
        if row.verdict in {Verdict.DIFFERENT, Verdict.SKIPPED}
        and not (known.of(row.block).because or known.of(row.block).skip)
    ]
    assert bare == []


def test_every_entry_names_a_block_and_is_still_needed(table: list[Row]) -> None:
    verdicts = {row.block.id: row.verdict for row in table}
    entries = needs.read().blocks
    assert entries.keys() <= verdicts.keys()
    explained = {name for name, need in entries.items() if need.because}
    assert {verdicts[name] for name in explained} == {Verdict.DIFFERENT}


# -- the harness bites -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(2), -torch.zeros(2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(1, 2)),
        (torch.ones(1), torch.nextafter(torch.ones(1), torch.tensor([2.0]))),
        ([1, 2], (1, 2)),
        ([1], [1, 2]),
        ({"a": 1}, {"a": 1.0}),
        ({"a": [torch.zeros(1)]}, {"a": [torch.ones(1)]}),
        (None, "None"),
    ],
)
def test_what_differs_is_seen(one: object, other: object) -> None:
    assert difference(shown(one), shown(one)) == ""
    assert difference(shown(one), shown(other)) != ""


@pytest.mark.parametrize(
    "changed",
    [
        Outcome(values={"x": 2}, printed=["a"]),
        Outcome(values={"x": 1, "y": 1}, printed=["a"]),
        Outcome(values={"x": 1}, printed=["b"]),
        Outcome(values={"x": 1}, printed=["a"], error=("ValueError", "no")),
    ],
)
def test_outcomes_part(changed: Outcome) -> None:
    first = Outcome(values={"x": 1}, printed=["a"])
    assert parting(first, first) == ""
    assert parting(first, changed) != ""


@pytest.mark.parametrize(
    ("local", "remote"),
    [
        ("with m.trace(x): pass", "with m.trace(x, remote=True): pass"),
        ("with m.session(): pass", "with m.session(remote=True): pass"),
        ("with m.trace(\n  x,\n): pass", "with m.trace(\n  x, remote=True,\n): pass"),
        (
            "with m.session():\n  with m.trace(x): pass",
            "with m.session(remote=True):\n  with m.trace(x): pass",
        ),
        ("with m.edit() as (t, e): pass", "with m.edit() as (t, e): pass"),
        ('with m.trace("é", y=1): pass', 'with m.trace("é", y=1, remote=True): pass'),
    ],
)
def test_a_block_goes_both_ways(local: str, remote: str) -> None:
    assert forms.remote_form(local) == remote
    assert forms.remote_form(remote) == remote
    assert forms.local_form(local) == local
    if "\n)" not in local:
        assert forms.local_form(remote) == local


def test_a_dry_run_becomes_a_real_one() -> None:
    assert (
        forms.remote_form('with m.trace(x, remote="local"): 1')
        == "with m.trace(x, remote=True): 1"
    )


def test_blocks_are_found_whether_indented_or_not() -> None:
    text = "```python\na = 1\n```\n- item\n\n  ```python\n  b = 2\n  ```\n```bash\nno\n```\n"
    assert [(block.id, block.text) for block in parse("p", text)] == [
        ("p#1", "a = 1\n"),
        ("p#2", "b = 2\n"),
    ]


def test_names_that_a_block_binds_and_wants() -> None:
    text = "import os\nwith m.trace(p) as t:\n    h = [i for i in q]\ndef f(a):\n    z = a + w\n"
    assert forms.bound(text) == ["t", "h"]
    assert sorted(forms.wanted(text)) == ["m", "p", "q", "w"]


def test_what_was_printed_remotely_is_told_from_status_lines() -> None:
    status = "\r\033[K◉ [job] RECEIVED     (0.0s)\r\033[K● [job] RUNNING      (0.1s)"
    log = "\r\033[K\N{INFORMATION SOURCE} [job] LOG            from the server\n"
    done = "\r\033[K✓ [job] COMPLETED    (0.2s)\nand from here\n"
    assert runner.printed(f"before\n{status}{log}{done}") == [
        "before",
        "  from the server",
        "and from here",
    ]


class RemoteError(Exception):
    pass


def test_an_exception_there_is_named_as_one_here() -> None:
    told = 'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    x\n    ^\npkg.Late: gone\nmore'
    assert runner.raised(RemoteError(told)) == ("Late", "gone")
    assert runner.raised(RemoteError("cancelled by ada")) == ("RemoteError", "cancelled by ada")
    assert runner.raised(KeyError("a")) == ("KeyError", "'a'")
