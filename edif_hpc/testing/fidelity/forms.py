"""The two forms of a block: for a local run and for a remote one.

A researcher moves a block to the server by writing `remote=True` at its outermost trace, generation, pipeline or session; an
inner one belongs to the job around it. That is all that is done here, on the text, so that nnsight stays unmodified and
sees the source that it runs. A block that asks for `remote` itself keeps it in the remote form (`"local"`, nnsight's dry run,
becomes `True`) and loses it in the local one.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

OPENERS: Final = frozenset({"trace", "generate", "pipe", "session"})
#: Keywords that only mean something to a remote run.
REMOTE_ONLY: Final = frozenset({"remote", "blocking"})
_DECIDED: Final = frozenset({"remote", "backend"})


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """Replace `start:stop`, offsets into the bytes of the text."""

    start: int
    stop: int
    text: bytes


def remote_form(text: str) -> str:
    """The text with every outermost opener sent to the server."""
    source = _Source(text)
    edits = []
    for call in _outermost(ast.parse(text)):
        given = {keyword.arg: keyword for keyword in call.keywords}
        if not _DECIDED & given.keys():
            edits.append(source.add(call, b"remote=True"))
        elif "remote" in given and source.literal(given["remote"].value) == "'local'":
            edits.append(source.put(given["remote"].value, b"True"))
    return source.edited(edits)


def local_form(text: str) -> str:
    """The text with nothing sent anywhere."""
    source = _Source(text)
    edits = [
        edit for call in _openers(ast.parse(text)) for edit in source.without(call, REMOTE_ONLY)
    ]
    return source.edited(edits)


def bound(text: str) -> list[str]:
    """The public names that the text binds outside functions and classes, but for imports, in order."""
    names = [n.id for n in _scope(ast.parse(text)) if isinstance(n, ast.Name) and _stores(n)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def wanted(text: str) -> list[str]:
    """The names that the text takes from before it, in order."""
    tree = ast.parse(text)
    made = set(bound(text)) | {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                made.add(node.name)
            case ast.arg():
                made.add(node.arg)
            case ast.Name() if _stores(node):
                made.add(node.id)
    names = [n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not _stores(n)]
    return [n for n in dict.fromkeys(names) if n not in made and not hasattr(builtins, n)]


def _stores(name: ast.Name) -> bool:
    return isinstance(name.ctx, ast.Store)


def _scope(node: ast.AST) -> Iterator[ast.AST]:
    """Everything of the module's own scope."""
    closed = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
    comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, closed | comprehension):
            yield child
            yield from _scope(child)


def _calls(node: ast.With | ast.AsyncWith) -> Iterator[ast.Call]:
    for item in node.items:
        match item.context_expr:
            case ast.Call(func=ast.Attribute(attr=attr)) as call if attr in OPENERS:
                yield call


def _openers(node: ast.AST) -> Iterator[ast.Call]:
    for each in ast.walk(node):
        if isinstance(each, ast.With | ast.AsyncWith):
            yield from _calls(each)


def _outermost(node: ast.AST) -> Iterator[ast.Call]:
    for child in ast.iter_child_nodes(node):
        calls = list(_calls(child)) if isinstance(child, ast.With | ast.AsyncWith) else []
        if calls:
            yield from calls
        else:
            yield from _outermost(child)


class _Source:
    """A text that can be edited at the places of its syntax tree, which counts in bytes."""

    def __init__(self, text: str) -> None:
        self._bytes = text.encode()
        self._lines = [0]
        for line in self._bytes.splitlines(keepends=True):
            self._lines.append(self._lines[-1] + len(line))

    def edited(self, edits: list[_Edit]) -> str:
        result = self._bytes
        for edit in sorted(edits, key=lambda each: each.start, reverse=True):
            result = result[: edit.start] + edit.text + result[edit.stop :]
        return result.decode()

    def literal(self, node: ast.expr) -> str:
        return repr(node.value) if isinstance(node, ast.Constant) else ""

    def put(self, node: ast.expr, text: bytes) -> _Edit:
        start, stop = self._span(node)
        return _Edit(start=start, stop=stop, text=text)

    def add(self, call: ast.Call, text: bytes) -> _Edit:
        """Add a last argument."""
        given = self._arguments(call)
        place = given[-1][1] if given else self._span(call)[1] - 1
        return _Edit(start=place, stop=place, text=b", " + text if given else text)

    def without(self, call: ast.Call, names: frozenset[str]) -> Iterator[_Edit]:
        """Take arguments away, if they are given."""
        gone = [self._span(each) for each in call.keywords if each.arg in names]
        if gone:
            given = self._arguments(call)
            kept = [self._bytes[start:stop] for start, stop in given if (start, stop) not in gone]
            yield _Edit(start=given[0][0], stop=given[-1][1], text=b", ".join(kept))

    def _arguments(self, call: ast.Call) -> list[tuple[int, int]]:
        given: list[ast.expr | ast.keyword] = [*call.args, *call.keywords]
        return sorted(self._span(each) for each in given)

    def _span(self, node: ast.expr | ast.keyword) -> tuple[int, int]:
        start = self._lines[node.lineno - 1] + node.col_offset
        end_line, end_column = node.end_lineno or node.lineno, node.end_col_offset or 0
        return start, self._lines[end_line - 1] + end_column
