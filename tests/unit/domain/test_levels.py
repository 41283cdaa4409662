"""Levels and what is told of them. Whether it is so is tried in tests/integration/worker/test_libraries.py."""

from __future__ import annotations

import pytest

from edif_hpc.domain.levels import RULES, Level, Verdict, rule, told


def test_a_stronger_level_reaches_the_floor_of_a_weaker_one() -> None:
    assert Level.FULL.reaches(Level.PROCESS)
    assert Level.PROCESS.reaches(Level.PROCESS)
    assert not Level.NO_NAMESPACES.reaches(Level.FULL)


def test_every_rule_speaks_of_every_level() -> None:
    assert all(set(each.verdicts) == set(Level) for each in RULES)
    assert len({each.name for each in RULES}) == len(RULES)


@pytest.mark.parametrize("level", [Level.FULL, Level.NO_NAMESPACES])
def test_nothing_is_left_open_where_strangers_may_be(level: Level) -> None:
    assert Verdict.OPEN not in {each.verdicts[level] for each in RULES}


def test_a_weaker_level_never_forbids_less_for_sure() -> None:
    """What `full` denies is denied below it, or open: it is never promised to work."""
    for each in RULES:
        if each.verdicts[Level.FULL] is Verdict.NO:
            assert each.verdicts[Level.PROCESS] is not Verdict.YES, each.name


def test_what_is_told() -> None:
    by_name = {each["name"]: each for each in told(Level.NO_NAMESPACES)}
    assert by_name["processes"] == {
        "name": "processes",
        "what": rule("processes").what,
        "verdict": "no",
        "note": rule("processes").instead,
    }
    assert {each["note"] for each in told(Level.PROCESS) if each["verdict"] == "open"} == {
        "whatever the worker's account may"
    }
