"""A library that the engine cannot serve with is named before it does harm."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.model import versions


def test_what_is_installed_here_serves() -> None:
    versions.check()


@pytest.mark.parametrize(
    ("library", "found"),
    [("transformers", "5.23.0"), ("transformers", "5.18.1"), ("nnsight", "0.9.0")],
)
def test_what_breaks_is_refused_with_the_way_out(library: str, found: str) -> None:
    wanted = versions.SERVED[library]
    with pytest.raises(EngineError, match=f"{library} {found} is installed") as refused:
        versions.judge(library, found, wanted)
    assert f"pip install '{library}{wanted}'" in str(refused.value)


def test_the_package_demands_the_same() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    demanded = {
        each.name: each.specifier
        for each in map(Requirement, project["optional-dependencies"]["worker"])
    }
    for library, wanted in versions.SERVED.items():
        assert demanded[library] == SpecifierSet(wanted)
