"""The tables of the adversarial suite, and the page that shows them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from edif_hpc.testing.attacks import payloads, runner
from edif_hpc.testing.attacks.expected import CASES, GUARDS, Case
from edif_hpc.testing.attacks.ground import Ground
from edif_hpc.testing.attacks.knocks import KNOCKS
from edif_hpc.testing.attacks.page import page
from edif_hpc.worker.engine.values import Level

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "attacks.md"
OUTCOMES = {"denied", "gone", "allowed", "user", "oom", "timeout", "limit", "crash"}


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == page(), "run python -m edif_hpc.testing.attacks.page"


def test_names_are_unique_and_outcomes_known() -> None:
    names = [case.name for case in CASES] + [knock.name for knock in KNOCKS]
    assert len(names) == len(set(names))
    for case in CASES:
        assert set(case.outcomes) == set(Level)
        assert frozenset().union(*case.outcomes.values()) <= OUTCOMES
    assert set(GUARDS.values()) <= {case.name for case in CASES}


def test_every_payload_is_sent() -> None:
    functions = {
        each
        for _, each in inspect.getmembers(payloads, inspect.isfunction)
        if each is not payloads.call
    }
    assert functions == {case.payload for case in CASES}


def test_nothing_is_allowed_where_strangers_meet() -> None:
    """At the level that is meant for them, but for what its case says is harmless."""
    harmless = {"see that a file exists"}
    allowed = {case.name for case in CASES if "allowed" in case.outcomes[Level.FULL]}
    assert allowed == harmless


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_code_of_a_request_is_python(case: Case, tmp_path: Path) -> None:
    facts = {"worker": 1, "port": 1}
    names = (
        "secret order scratch neighbour relay_data outside weights home package datagrams abstract"
    )
    code = runner.source(case, facts | dict.fromkeys(names.split(), "/somewhere"))
    [block] = [each for each in ast.parse(code).body if isinstance(each, ast.FunctionDef)]
    assert block.name == "block"


@pytest.mark.parametrize(
    ("told", "left", "found"),
    [
        (runner.Told(end="denied"), [], "denied"),
        (runner.Told(end="done"), [], "gone"),
        (runner.Told(end="got"), [], "allowed"),
        (runner.Told(kind="oom"), [], "oom"),
        (runner.Told(end="denied"), ["a file was made"], "allowed"),
        (runner.Told(kind="crash"), ["a file was made"], "allowed"),
    ],
)
def test_outcomes(told: runner.Told, left: list[str], found: str) -> None:
    assert runner.outcome(told, left) == found


def test_what_is_left_is_seen_and_put_right(tmp_path: Path) -> None:
    with Ground(root=tmp_path / "ground") as ground:
        assert ground.left() == []
        ground.secret.write_bytes(b"changed")
        ground.secret.chmod(0o666)
        (ground.outside / "more").touch()
        (tmp_path / ground.name).touch()
        assert len(ground.left(str(tmp_path))) == 5
        assert ground.left(str(tmp_path)) == []
