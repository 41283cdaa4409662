r"""A researcher's Python process, driven from outside.

An unmodified nnsight client belongs into a process of its own: it reads its settings when it is imported, and its interrupts
and crashes must not be ours. Importing it takes seconds, so the process stays and runs one cell after another, like a
notebook: each is a file, because nnsight reads the source of the block that it sends.

    with ClientProcess(stack.client_environ(token), folder) as client:
        client.run("model = LanguageModel('edif/tiny-gpt2')")
        told = client.run("with model.trace('hi', remote=True): x = model.output.save()\nreport(shape=list(x.shape))")

`report(**values)` hands plain values back. An exception in a cell is `CellFailed`, with its class's name and its text.
"""

from __future__ import annotations

import contextlib
import io
import json
import queue
import runpy
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

CELL_S: Final = 120.0
_PROLOGUE: Final = """
import logging, warnings
warnings.filterwarnings("ignore")
from nnsight import CONFIG
CONFIG.APP.REMOTE_LOGGING = False
"""


class CellFailed(Exception):
    """A cell raised. `error` is the name of its class, `text` what it says, `output` what the cell printed."""

    def __init__(self, error: str, text: str, trace: str, output: str) -> None:
        super().__init__(f"{error}: {text}\n{trace}")
        self.error, self.text, self.output = error, text, output


class ClientProcess:
    """The process, from the outside."""

    def __init__(
        self, environ: Mapping[str, str], folder: Path, *, prologue: str = _PROLOGUE
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._cells = folder, 0
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        with (folder / "client.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "edif_hpc.testing.client_process", str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=dict(environ),
                cwd=folder,
                start_new_session=True,
            )
        self._reader = threading.Thread(
            target=self._read, name=f"client {folder.name}", daemon=True
        )
        self._reader.start()
        if prologue:
            self.run(prologue)

    def start(self, code: str) -> None:
        """Begin a cell; `wait` for it."""
        self._cells += 1
        cell = self._folder / f"cell_{self._cells}.py"
        cell.write_text(textwrap.dedent(code).strip() + "\n")
        self._pipe(self.process.stdin).write(f"{cell}\n")
        self._pipe(self.process.stdin).flush()

    def wait(self, timeout_s: float = CELL_S) -> dict[str, Any]:
        """What the cell that was started has reported; `output` is what it printed."""
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(
                f"cell {self._cells} of {self._folder} did not end within {timeout_s} s"
            ) from None
        if not answer:
            raise CellFailed(
                "EndOfProcess", f"the client ended with {self.process.wait()}", self.log, ""
            )
        told = json.loads(answer)
        if told["error"]:
            raise CellFailed(told["error"], told["text"], told["trace"], told["output"])
        return {"output": told["output"], **told["reported"]}

    def run(self, code: str, timeout_s: float = CELL_S) -> dict[str, Any]:
        """Run a cell to its end."""
        self.start(code)
        return self.wait(timeout_s)

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)

    @property
    def log(self) -> str:
        """What the process wrote to its standard error."""
        return (self._folder / "client.log").read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self._pipe(self.process.stdout).close()
        with contextlib.suppress(BrokenPipeError):
            self._pipe(self.process.stdin).close()

    def _read(self) -> None:
        for line in self._pipe(self.process.stdout):
            self._answers.put(line)
        self._answers.put("")

    @staticmethod
    def _pipe(pipe: Any) -> Any:
        if pipe is None:
            raise OSError("the client process has no such pipe")
        return pipe

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _run_cell(cell: str, names: dict[str, Any]) -> dict[str, Any]:
    reported: dict[str, Any] = {}
    printed = io.StringIO()
    names["report"] = reported.update
    told: dict[str, Any] = {"error": "", "text": "", "trace": ""}
    try:
        with contextlib.redirect_stdout(printed):
            names.update(runpy.run_path(cell, init_globals=names))
    except Exception as error:  # noqa: BLE001 - a cell's error is an answer
        told = {"error": type(error).__name__, "text": str(error), "trace": traceback.format_exc()}
    return told | {"reported": reported, "output": printed.getvalue()}


def main() -> None:
    """Run the cells that standard input names; answer each with a line of JSON. An interrupt ends the process."""
    names: dict[str, Any] = {}
    answers = sys.stdout
    for line in sys.stdin:
        answers.write(json.dumps(_run_cell(line.strip(), names)) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
