"""One attempt from its row to its outcome: the code of the request, the facts that it is told, and what it came to.

The request is an ordinary session of nnsight, whose block holds the payload's source. What the block saw comes back as a saved value;
what the system did to it comes back as the kind of an ERROR; and what it left is looked for on the ground.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from edif_hpc.testing.attacks import payloads
from edif_hpc.testing.attacks.expected import Case

_BLOCK: Final = """
import nnsight
from typing import Any


def block(model, **how):
    where = {where!r}
    with model.session(**how):
{payload}
        told = nnsight.save({{"end": "done", "text": ""}})
        loot = None
        try:
            loot = {name}(model, where)
            if loot is not None:
                told["end"], told["text"] = "got", {shown}
        except OSError as error:
            told["end"], told["text"] = "denied", repr(error)[:200]
{returned}
    return told
"""


@dataclass(frozen=True, kw_only=True)
class Told:
    """How a request ended, as its client sees it: `kind` of an ERROR, or what the block says of itself."""

    kind: str = ""
    end: str = ""
    text: str = ""


def source(case: Case, facts: Mapping[str, Any]) -> str:
    """The module of a researcher who tries this: a function `block`, which sends it."""
    where = {**facts, **{name: _filled(value, facts) for name, value in case.arguments.items()}}
    pieces = [inspect.getsource(payloads.call), inspect.getsource(case.payload)]
    payload = textwrap.indent("\n".join(pieces), " " * 8)
    shown = "type(loot).__name__" if case.returned else "repr(loot)[:200]"
    returned = "        value = nnsight.save(loot)" if case.returned else ""
    return _BLOCK.format(
        where=where, payload=payload, name=case.payload.__name__, returned=returned, shown=shown
    )


def outcome(told: Told, left: list[str], *, returned: bool = False) -> str:
    """Which of the outcomes it is."""
    if left:
        return "allowed"
    if told.kind:
        return told.kind
    if told.end == "got" and not returned:
        return "allowed"
    return "denied" if told.end == "denied" else "gone"


def _filled(value: Any, facts: Mapping[str, Any]) -> Any:
    return value.format_map(facts) if isinstance(value, str) and "{" in value else value
