"""A stand-in for the pilot: tells what it sees, does what its order says, and never stays for long.

Its order is a JSON file: `exit_code` (absent: it stays until it is told to leave) and `stays` (it does not leave on SIGTERM).
What it sees goes to `witness.jsonl` beside the order, a line for each event: `started` with its environment, and signals.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

LONGEST_S = 240.0
_TOLD = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


def main(argv: list[str]) -> int:
    """Run one."""
    order_file = Path(argv[1])
    order = json.loads(order_file.read_text())
    signal.pthread_sigmask(signal.SIG_BLOCK, _TOLD)
    with order_file.with_name("witness.jsonl").open("a", buffering=1) as out:

        def tell(event: str, **facts: Any) -> None:
            out.write(json.dumps({"event": event, **facts}) + "\n")

        tell("started", pid=os.getpid(), environ=dict(os.environ))
        if "exit_code" in order:
            return int(order["exit_code"])
        until = time.monotonic() + LONGEST_S
        while (left := until - time.monotonic()) > 0:
            told = signal.sigtimedwait(_TOLD, left)
            if told is None:
                break
            tell(signal.Signals(told.si_signo).name)
            if told.si_signo == signal.SIGTERM and not order.get("stays"):
                return 0
    return 9


def told(folder: Path) -> list[dict[str, Any]]:
    """What the witness of a folder has told so far."""
    try:
        text = (folder / "witness.jsonl").read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
