"""Rules of the house that no linter knows. Each takes the folder it judges, so it can be shown to bite."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.failpoints import KNOWN

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "edif_hpc"
MAX_LINES = 400
#: A list that is to be read as one: every attempt of the adversarial suite.
LISTS = {"attacks/payloads.py"}
DUMPING = {"dump", "dumps"}
LIGHT = (
    "cli/main",
    "cli/launcher",
    "launcher/daemon",
    "pilot/app",
    "relay/app",
    "worker/app",
    "worker/engine/pool",
    "worker/reach",
)
HIT = re.compile(r"""\.hit\(\s*["']([^"']+)["']""")


def modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def is_list(path: Path) -> bool:
    return "/".join(path.parts[-2:]) in LISTS


def too_long(folder: Path) -> list[str]:
    lengths = {
        path: len(path.read_text().splitlines()) for path in modules(folder) if not is_list(path)
    }
    return [
        f"{path.name}: {length} lines" for path, length in lengths.items() if length > MAX_LINES
    ]


def pickle_uses(tree: ast.AST) -> Iterator[str]:
    """The names used from pickle and its like, however they were imported."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="pickle" | "cloudpickle" | "marshal", names=names):
                yield from (alias.name for alias in names)
            case ast.Import(names=names):
                yield from (
                    f"{a.name} as {a.asname}" for a in names if a.name == "pickle" and a.asname
                )
            case ast.Attribute(value=ast.Name(id="pickle" | "cloudpickle" | "marshal"), attr=attr):
                yield attr


def loading(folder: Path) -> list[str]:
    return [
        f"{path.name}: {use}"
        for path in modules(folder)
        for use in pickle_uses(ast.parse(path.read_text()))
        if use not in DUMPING
    ]


def hit_names(folder: Path) -> set[str]:
    callers = [path for path in modules(folder) if path.name != "failpoints.py"]
    return {name for path in callers for name in HIT.findall(path.read_text())}


def test_modules_stay_short() -> None:
    assert too_long(PACKAGE) == [], "when a module grows, a concept is missing"


def test_the_relay_only_ever_dumps() -> None:
    assert loading(PACKAGE / "relay") == [], (
        "what a researcher or a worker sent is never unpickled"
    )


def test_every_hit_failpoint_is_known() -> None:
    assert hit_names(PACKAGE) <= set(KNOWN)


def test_every_known_failpoint_is_hit() -> None:
    assert set(KNOWN) <= hit_names(PACKAGE), "a failpoint that nobody hits tests nothing"


@pytest.mark.parametrize("module", LIGHT)
def test_only_the_zygote_and_its_executors_load_torch(module: str) -> None:
    name = f"edif_hpc.{module.replace('/', '.')}"
    program = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], check=False, cwd=ROOT)
    assert loaded.returncode == 0


def test_the_length_rule_bites(tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text("x = 1\n" * (MAX_LINES + 1))
    (tmp_path / "short.py").write_text("x = 1\n" * MAX_LINES)
    assert too_long(tmp_path) == [f"long.py: {MAX_LINES + 1} lines"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle\npickle.dumps(1)", []),
        ("import pickle\npickle.loads(b)", ["a.py: loads"]),
        ("import pickle\nread = pickle.Unpickler", ["a.py: Unpickler"]),
        ("from pickle import loads", ["a.py: loads"]),
        ("import pickle as p\np.loads(b)", ["a.py: pickle as p"]),
    ],
)
def test_the_pickle_rule_bites(tmp_path: Path, source: str, found: list[str]) -> None:
    (tmp_path / "a.py").write_text(source)
    assert loading(tmp_path) == found


def test_the_failpoint_rule_sees_calls(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('self._failpoints.hit("store.commit.before")')
    assert hit_names(tmp_path) == {"store.commit.before"}
