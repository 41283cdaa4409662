"""The docs keep up with the code: links resolve, and every setting, error and command is described."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from edif_hpc import errors

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
LINK = re.compile(r"\[[^\]]*\]\(<?([^)>\s]+)[^)]*\)")
HEADING = re.compile(r"^#+ +(.+?) *#*$", re.MULTILINE)
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
MACHINE_PATH = re.compile(r"(?:^|[^\w.])/(?:work|farm|root)/")
TEXT = {".md", ".py", ".toml", ".sh", ".sql", ".html", ".css", ".js", ".def", ""}
ROOMS = ("edif_hpc", "tests", "docs", "scripts", "apptainer", "slurm", ".ci")


def pages(root: Path) -> list[Path]:
    return sorted([*root.glob("*.md"), *(root / "docs").rglob("*.md")])


def slugs(page: Path) -> set[str]:
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def broken_links(root: Path) -> Iterator[str]:
    for page in pages(root):
        for link in LINK.findall(FENCE.sub("", page.read_text())):
            path, _, anchor = link.partition("#")
            target = (page.parent / path) if path else page
            if re.match(r"[a-z]+:", link):
                continue
            if not target.exists() or (anchor and anchor not in slugs(target)):
                yield f"{page.relative_to(root)}: {link}"


def project_files(root: Path) -> Iterator[Path]:
    yield from (path for path in root.iterdir() if path.is_file() and path.suffix in TEXT - {""})
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts:
                yield path


def machine_paths(root: Path) -> Iterator[str]:
    for path in project_files(root):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if MACHINE_PATH.search(line):
                yield f"{path.relative_to(root)}:{number}"


def described(page: Path) -> set[str]:
    """The words a page sets as code; of a dotted one also its last part."""
    spans = CODE.findall(page.read_text()) if page.exists() else []
    return {word for span in spans for word in (span, span.rpartition(".")[2])}


def error_classes(module: ModuleType) -> list[type[errors.EdifError]]:
    classes = [value for _, value in inspect.getmembers(module, inspect.isclass)]
    return [
        c for c in classes if issubclass(c, errors.EdifError) and c.__module__ == module.__name__
    ]


def setting_names(module: ModuleType) -> set[str]:
    values = [value for _, value in inspect.getmembers(module, dataclasses.is_dataclass)]
    own = [value for value in values if value.__module__ == module.__name__]
    return {field.name for value in own for field in dataclasses.fields(value)}


def test_every_link_resolves() -> None:
    assert list(broken_links(ROOT)) == []


def test_no_path_of_one_machine() -> None:
    assert list(machine_paths(ROOT)) == []


def test_every_error_is_described() -> None:
    classes = error_classes(errors)
    words = described(REFERENCE / "errors.md")
    expected = {c.code for c in classes} | {c.__name__ for c in classes}
    assert sorted(expected - words) == [], "describe them in docs/reference/errors.md"


def test_error_codes_are_unique() -> None:
    codes = [c.code for c in error_classes(errors)]
    assert sorted(codes) == sorted(set(codes))


def test_every_setting_is_described() -> None:
    names = setting_names(importlib.import_module("edif_hpc.settings"))
    words = described(REFERENCE / "settings.md")
    assert sorted(names - words) == [], "describe them in docs/reference/settings.md"


def test_the_command_line_page_is_current() -> None:
    command = [sys.executable, ROOT / "scripts/docs-cli", "--check"]
    check = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert check.returncode == 0, check.stderr


def test_the_link_rule_bites(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# One *two*\n[x](b.md#three) [y](#one-two) [z](c.md)")
    (tmp_path / "docs" / "b.md").write_text("```\n# three\n[q](gone.md)\n```\n[r](https://a.b/c)")
    assert list(broken_links(tmp_path)) == ["docs/a.md: b.md#three", "docs/a.md: c.md"]


def test_the_path_rule_bites(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("\n".join(["see /" + "root/x", "https://a.b/" + "work/y"]))
    assert list(machine_paths(tmp_path)) == ["a.md:1"]
