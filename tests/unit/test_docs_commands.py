"""What pages tell people to type can be typed, and the table of levels is that of the program."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from edif_hpc.cli.main import main
from edif_hpc.domain import levels

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: A page of whole help texts, and one generated from them.
GENERATED = {"cli.md"}
FENCE = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`(edif-hpc [^`\n]+)`")
#: A line of a shell before a command: variables, redirections and what comes after it are not looked at.
COMMAND = re.compile(r"(?:^|[\s$(])(edif-hpc [^|&>)\n]+)")


def commands(text: str) -> Iterator[str]:
    """The commands of ours in blocks of a shell, and those set as code."""
    for block in FENCE.findall(text):
        yield from COMMAND.findall(block.replace("\\\n", " "))
    yield from SPAN.findall(text)


def complaint(line: str) -> str | None:
    """What the command line would say of a command that does not exist, or has no such option."""
    words = shlex.split(line.replace("…", "x").replace("'", ""), comments=True)[1:]
    words = words[: words.index("...")] if "..." in words else words
    command: click.Command = main
    context = click.Context(main)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        if found is None:
            return f"no command {words[0]}"
        command, words = found, words[1:]
    try:
        command.make_context("edif-hpc", [*words], resilient_parsing=False)
    except (click.NoSuchOption, click.BadOptionUsage) as error:
        return error.format_message()
    except (click.UsageError, click.exceptions.Exit):  # a value that stands for another, or none
        return None
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_to_be_typed_is_a_command(page: Path) -> None:
    told = [] if page.name in GENERATED else commands(page.read_text())
    wrong = {line: said for line in told if (said := complaint(line)) is not None}
    assert wrong == {}


def test_the_table_of_levels_is_current() -> None:
    page = (ROOT / "docs/howto/read-a-level.md").read_text()
    assert f"\n{levels.table()}\n" in page, "it is what edif_hpc.domain.levels.table() returns"


def test_the_command_rule_bites() -> None:
    text = "```bash\nA=b edif-hpc ps --json | head  # all\n```\nor `edif-hpc logs gpt2`"
    assert [*commands(text)] == ["edif-hpc ps --json ", "edif-hpc logs gpt2"]
    for line in ("site check hpc --probe  # a node", "up gpt2 --store /not/here", "--help", "ps"):
        assert complaint(f"edif-hpc {line}") is None, line
    for line in ("site look hpc", "ps --loudly", "prune"):
        assert complaint(f"edif-hpc {line}") is not None, line
