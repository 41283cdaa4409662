"""What `edif-hpc up` starts belongs to no terminal: neither Ctrl-C nor closing it reaches a worker."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edif_hpc.cli.exits import Exit
from edif_hpc.testing.stack import Stack, child_environ

pytestmark = pytest.mark.slow

MODEL = "edif/tiny-gpt2"


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Iterator[Stack]:
    """A relay and a hub, no workers."""
    with Stack(root=tmp_path_factory.mktemp("up"), models={MODEL: tiny_gpt2}) as running:
        yield running


@pytest.fixture
def on_a_terminal(relay: Stack) -> Callable[..., tuple[int, int]]:
    """Run a command line on a terminal of its own; returns its pid and the terminal's other end."""
    told = {
        "EDIF_RELAY": relay.url, "EDIF_TOKEN": relay.operator.token, "EDIF_STATE_DIR": str(relay.root / "local"),
        "HF_ENDPOINT": relay.hub, "HF_HUB_CACHE": str(relay.root / "cache"),
    }  # fmt: skip

    def start(*arguments: str) -> tuple[int, int]:
        command = [sys.executable, "-m", "edif_hpc.cli.main", *arguments]
        pid, terminal = pty.fork()
        if pid == 0:
            os.execvpe(command[0], command, child_environ() | told)
        return pid, terminal

    return start


def read_until(terminal: int, text: bytes) -> bytes:
    """What the terminal shows, up to this text."""
    seen = b""
    while text not in seen:
        seen += os.read(terminal, 4096)
    return seen


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def interrupt(terminal: int) -> None:
    os.write(terminal, b"\x03")


@pytest.mark.parametrize("end", [interrupt, os.close], ids=["Ctrl-C", "closed"])
def test_a_worker_outlives_its_terminal(
    end: Callable[[int], None], relay: Stack, on_a_terminal: Callable[..., tuple[int, int]]
) -> None:
    pid, terminal = on_a_terminal("up", MODEL)  # it waits, because this is a terminal
    read_until(terminal, b"importing")
    end(terminal)
    assert exit_code(pid) != Exit.OK
    relay.wait_warm("tiny-gpt2", timeout_s=90.0)
    assert len(relay.processes("pilot")) == 1
    pid, terminal = on_a_terminal("down", "tiny-gpt2")
    read_until(terminal, b"gone")
    assert exit_code(pid) == Exit.OK
    assert [
        each.command for each in relay.processes() if each.kind not in {"relay", "other"}
    ] == []
