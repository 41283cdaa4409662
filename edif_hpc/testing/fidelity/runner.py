"""Runs pages of blocks in one process, the unmodified nnsight client, and writes down what each block did.

A page is run like a notebook: its blocks in order, in one module of its own, which is a file, since nnsight reads the
source of what it sends. Names that a block takes from text which is no code are bound before it (its *prelude*). For each
block the outcome tells what it bound, printed and raised.

    python -m edif_hpc.testing.fidelity.runner PLAN OUTCOMES
"""

from __future__ import annotations

import io
import os
import pickle
import random
import re
import sys
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final

import msgspec

SEED: Final = 7
_REDRAW: Final = "\r\033[K"
_LOG = re.compile("\N{INFORMATION SOURCE}" + r" \[[^\]]*\] LOG {9} ?(?P<text>.*)", re.DOTALL)
_DOWNLOAD = re.compile(r"\r⬇[^\r\n]*\n?")
_RAISED = re.compile(r"(?:[A-Za-z_]\w*\.)*(?P<type>[A-Za-z_]\w*)(?:: (?P<text>.*))?")


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """A block as it is to be run: the names to compare, what to run before it, itself."""

    id: str
    names: list[str]
    before: str
    text: str


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A page to run."""

    name: str
    steps: list[Step]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that one process runs; `folder` takes the pages' files."""

    folder: str
    pages: list[Page]


class Tape(io.TextIOBase):
    """Stands for standard output and error from before the first import, so that every logger writes to it."""

    def __init__(self) -> None:
        self._text: list[str] = []

    def writable(self) -> bool:
        """Tell that this is a stream to write to."""
        return True

    def write(self, text: str) -> int:
        """Keep the text."""
        self._text.append(text)
        return len(text)

    def cut(self) -> str:
        """What was written since the last cut."""
        text = "".join(self._text)
        self._text.clear()
        return text


@dataclass(kw_only=True)
class Outcome:
    """What a block did. `error` is the class and the first line of what it raised; `trace` is for a person."""

    values: dict[str, Any] = field(default_factory=dict)
    printed: list[str] = field(default_factory=list)
    error: tuple[str, str] | None = None
    trace: str = ""
    seconds: float = 0.0


def run_page(page: Page, folder: Path, tape: Tape) -> Iterator[tuple[str, Outcome]]:
    """Run the blocks of a page in order; yield each id with its outcome."""
    from edif_hpc.testing.fidelity.values import shown

    file = folder / f"{page.name.replace('/', '_').replace('-', '_')}.py"
    # The whole file lies there before anything runs, as a researcher's script would.
    pieces = [code for step in page.steps for code in (step.before, step.text)]
    file.write_text("\n".join(pieces))
    module = types.ModuleType("__main__")
    module.__file__ = str(file)
    sys.modules["__main__"] = module
    line = 0
    for step in page.steps:
        start = line + step.before.count("\n") + 1
        outcome = run_code(step.before, line, file, vars(module))
        if not outcome.error:
            outcome = run_code(step.text, start, file, vars(module))
        line = start + step.text.count("\n") + 1
        outcome.printed = printed(tape.cut())
        outcome.values = {n: shown(vars(module)[n]) for n in step.names if n in vars(module)}
        yield step.id, outcome


def run_code(code: str, start: int, file: Path, scope: dict[str, Any]) -> Outcome:
    """Run a piece of the file that begins after line `start`."""
    outcome, began = Outcome(), monotonic()
    _settle()
    try:
        exec(compile("\n" * start + code, str(file), "exec"), scope)  # noqa: S102 - what this is for
    except Exception as error:  # noqa: BLE001 - a block's error is part of its outcome
        outcome.error, outcome.trace = raised(error), traceback.format_exc()
    outcome.seconds = monotonic() - began
    return outcome


def raised(error: BaseException) -> tuple[str, str]:
    """The class and first line of an exception; of a remote one, those of the exception on the server."""
    if type(error).__name__ != "RemoteError":
        return type(error).__name__, (str(error).splitlines() or [""])[0]
    lines = str(error).splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] :] if frames else lines
    told = next((line for line in after if line and not line.startswith(" ")), lines[0])
    match = _RAISED.fullmatch(told)
    return (match["type"], match["text"] or "") if match and frames else ("RemoteError", told)


def printed(tape: str) -> list[str]:
    """The lines that the block printed, here or on the server, without nnsight's own lines about how it gets on."""
    text, *redrawn = _DOWNLOAD.sub("", tape).split(_REDRAW)
    for piece in redrawn:
        status, _, rest = piece.partition("\n")
        log = _LOG.match(status)
        text += (f"{log['text']}\n" if log else "") + rest
    return text.splitlines()


def _settle() -> None:
    import numpy as np
    import torch

    warnings.simplefilter(
        "always"
    )  # an executor is new each time, and so shows what was shown before
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)


def main(arguments: list[str]) -> None:
    """Run a plan, write the outcomes."""
    plan = msgspec.json.decode(Path(arguments[0]).read_bytes(), type=Plan)
    folder = Path(plan.folder)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    sys.path.insert(0, str(folder))  # where a script finds the modules beside it
    tape = Tape()
    sys.stdout = sys.stderr = tape
    outcomes: dict[str, Outcome] = {}
    for page in plan.pages:
        outcomes.update(run_page(page, folder, tape))
    facts = {name: vars(outcome) for name, outcome in outcomes.items()}
    Path(arguments[1]).write_bytes(pickle.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
