"""What each block needs to run here, read from `needs.toml`.

Most blocks need nothing said: they run after the blocks before them on their page, and a name that no block has bound yet is
bound by the default that `[names]` gives for it. What a block needs besides, its entry says:

* `skip`: why it is not run at all;
* `before`: code to run before it;
* `after`: code that belongs to it, such as a call of what it only defines;
* `replace`: words in it that stand for something else, in addition to those of `[replace]`, which hold for all blocks;
* `twin`: what it has no local form for is compared with this code, run locally;
* `remote_only`: it asks the server something that no local run could answer, so it only has to run;
* `unprinted`: what it prints differs from run to run, such as the id of a request, and is not compared;
* `because`: why a run there cannot give what a local one gives, for the reader of the table.

`{url}` and `{token}` stand for the relay's address and the researcher's token.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Final

import msgspec

from edif_hpc.testing.fidelity import forms
from edif_hpc.testing.fidelity.corpus import Block
from edif_hpc.testing.fidelity.runner import Page, Step

FILE: Final = Path(__file__).with_name("needs.toml")


class Need(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one block needs."""

    skip: str = ""
    before: str = ""
    after: str = ""
    replace: dict[str, str] = {}
    twin: str = ""
    remote_only: str = ""
    unprinted: bool = False
    because: str = ""


class Needs(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The file. `spelling` says how words that are more than one token are cut."""

    names: dict[str, str]
    replace: dict[str, str]
    spelling: dict[str, list[str]]
    blocks: dict[str, Need]

    def of(self, block: Block) -> Need:
        """What a block needs."""
        return self.blocks.get(block.id, Need())


def read() -> Needs:
    """The file as it is."""
    return msgspec.toml.decode(FILE.read_bytes(), type=Needs)


def pages(
    blocks: Sequence[Block], needs: Needs, *, remote: bool, words: Mapping[str, str]
) -> list[Page]:
    """What to run; `words` are the values of `{url}` and `{token}`."""
    return [
        Page(name=name, steps=list(_steps(list(group), needs, remote=remote, words=words)))
        for name, group in groupby(blocks, key=lambda block: block.page)
    ]


def _steps(
    blocks: Sequence[Block], needs: Needs, *, remote: bool, words: Mapping[str, str]
) -> Iterator[Step]:
    known: set[str] = set()
    for block in blocks:
        need = needs.of(block)
        if need.skip or (need.remote_only and not remote):
            continue
        text = _text(block.text, need, needs, remote=remote)
        before = _form(_defaults([need.before, text], known, needs.names), remote=remote)
        for here, there in words.items():
            text, before = text.replace(here, there), before.replace(here, there)
        known |= _made(before) | _made(text)
        names = forms.bound(need.twin or f"{block.text}\n{need.after}")
        yield Step(id=block.id, names=names, before=before, text=text)


def _text(text: str, need: Need, needs: Needs, *, remote: bool) -> str:
    if need.twin and not remote:
        return need.twin
    for word, other in (needs.replace | need.replace).items():
        text = text.replace(word, other)
    text = f"{text}\n{need.after}" if need.after else text
    return _form(text, remote=remote)


def _form(text: str, *, remote: bool) -> str:
    return forms.remote_form(text) if remote else forms.local_form(text)


def _defaults(codes: Sequence[str], known: set[str], names: Mapping[str, str]) -> str:
    """The first code, with all before it that binds what both codes want and nothing has bound yet."""
    lines: list[str] = []
    bound = set(known)

    def bind(code: str) -> None:
        for name in forms.wanted(code):
            if name in names and name not in bound:
                bound.add(name)
                bind(names[name])
                lines.append(names[name])

    for code in codes:
        bind(code)
        bound.update(_made(code))
    return "\n".join([*lines, codes[0]]).strip("\n")


def _made(code: str) -> set[str]:
    """All names that a code leaves behind."""
    made = set(forms.bound(code))
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import() | ast.ImportFrom():
                made |= {each.asname or each.name.partition(".")[0] for each in node.names}
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                made.add(node.name)
            case _:
                pass
    return made
