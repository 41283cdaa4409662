"""The SQL files: found by name, complete, and without a statement that nobody uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edif_hpc.store import sql, sqlite

USE = re.compile(r'(?:_read|_write)\(\s*"(\w+)"|_sql\["(\w+)"\]|name = "(\w+)" if .* else "(\w+)"')


def test_statements_are_split_by_name() -> None:
    text = "-- A header.\n\n-- one --\n-- what it is for\nSELECT 1;\n\n-- two --\nSELECT\n  2;\n"
    assert sql.parse_queries(text) == {"one": "SELECT 1", "two": "SELECT\n  2"}


def test_a_name_comes_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        sql.parse_queries("-- one --\nSELECT 1;\n-- one --\nSELECT 2;\n")


def test_every_statement_is_used_and_exists() -> None:
    source = Path(sqlite.__file__).read_text()
    used = {name for groups in USE.findall(source) for name in groups if name}
    assert used == set(sql.load_queries())


def test_steps_are_numbered_without_gaps() -> None:
    steps = sql.load_migrations()
    assert [step.version for step in steps] == list(range(1, len(steps) + 1))
    assert all(re.fullmatch(r"\d{4}_\w+\.sql", step.name) for step in steps)
