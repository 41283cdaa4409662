"""The SQL of the store, kept in files and found by name.

`queries.sql` holds every statement under a line `-- name --`, with a comment that says what it is
for. `migrations/NNNN_name.sql` hold the schema, one step per file; the number is the version that
the step leads to. Steps are only ever added, so a database can tell by its version what it lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable

_NAME = re.compile(r"^-- (\w+) --$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Migration:
    """One step of the schema; `version` is what the database has after it."""

    version: int
    name: str
    sql: str


def parse_queries(text: str) -> Mapping[str, str]:
    """Split a text into its named statements; raise `ValueError` for a name that comes twice."""
    parts = _NAME.split(text)[1:]
    names, bodies = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"a query name comes twice among {sorted(names)}")
    return {name: _without_comments(body) for name, body in zip(names, bodies, strict=True)}


def load_queries() -> Mapping[str, str]:
    """The statements of `queries.sql`."""
    return parse_queries((_folder() / "queries.sql").read_text())


def load_migrations() -> list[Migration]:
    """All steps of the schema, in their order."""
    files = [each for each in (_folder() / "migrations").iterdir() if each.name.endswith(".sql")]
    return [
        Migration(version=int(each.name[:4]), name=each.name, sql=each.read_text())
        for each in sorted(files, key=lambda file: file.name)
    ]


def _folder() -> Traversable:
    return resources.files("edif_hpc.store")


def _without_comments(body: str) -> str:
    lines = [line for line in body.splitlines() if not line.startswith("--")]
    return "\n".join(lines).strip().removesuffix(";")
