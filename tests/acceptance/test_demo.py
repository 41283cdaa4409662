"""`edif-hpc demo`: it shows what it promises, and leaves nothing behind, however it ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edif_hpc.cli.exits import Exit
from edif_hpc.testing.processes import processes_of
from edif_hpc.testing.wait import wait_until

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "edif_hpc.cli.main", "demo"]
TIMEOUT_S = 180.0


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Its temporary folder is ours, and the user's own settings point at what it must not touch."""
    (tmp_path / "tmp").mkdir(mode=0o700)
    foreign = {
        "EDIF_RELAY": "http://127.0.0.1:9",
        "EDIF_TOKEN": "edif_not_mine",
        "EDIF_RELAY_PORT": "9",
    }
    foreign |= {
        "NDIF_HOST": "http://127.0.0.1:9",
        "NDIF_API_KEY": "not-mine",
        "HF_TOKEN": "hf_not_mine",
    }
    own = {
        "TMPDIR": str(tmp_path / "tmp"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "HOME": str(tmp_path),
    }
    return {**os.environ, **foreign, **own}


@pytest.fixture
def nothing_left(tmp_path: Path) -> Callable[[], None]:
    """Check that there is neither a process nor a file of it."""

    def check() -> None:
        assert [(each.pid, each.command) for each in processes_of(tmp_path)] == []
        assert list((tmp_path / "tmp").iterdir()) == []

    return check


def run(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


def test_the_demo(environ: dict[str, str], nothing_left: Callable[[], None]) -> None:
    done = run(environ)
    assert done.returncode == Exit.OK, done.stderr
    assert "all values are those of a local run" in done.stdout
    assert done.stdout.count("equal, bit for bit") == 5
    for status in ("RECEIVED", "DISPATCHED", "RUNNING", "COMPLETED"):
        assert done.stdout.count(f"] {status} ") == 4, status
    assert "50.3 MB came back" in done.stdout
    assert "nothing of it is left running" in done.stdout
    nothing_left()


def test_keep_and_stop(environ: dict[str, str], nothing_left: Callable[[], None]) -> None:
    done = run(environ, "--keep")
    try:
        assert done.returncode == Exit.OK, done.stderr
        *_, end = (each for each in done.stdout.splitlines() if each)
        assert end == "edif-hpc demo --stop"
        lines = [
            each.removeprefix("export ")
            for each in done.stdout.splitlines()
            if each.startswith("export ")
        ]
        researcher = dict(each.split("=", 1) for each in lines[-2].split())
        operator = dict(each.split("=", 1) for each in lines[-1].split())
        assert set(researcher) == {"NDIF_HOST", "NDIF_API_KEY", "HF_ENDPOINT"}
        clean = {k: v for k, v in environ.items() if not k.startswith(("EDIF_", "NDIF_", "HF_"))}
        ps = subprocess.run(
            [*COMMAND[:-1], "ps"],
            env=clean | operator,
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert "warm" in ps.stdout
        assert (
            "edif-hpc demo --stop" in run(environ).stderr
        )  # a second one would not know whose the note is
    finally:
        stopped = run(environ, "--stop")
    assert stopped.returncode == Exit.OK, stopped.stderr
    nothing_left()


def output_has(log: Path, text: str, process: subprocess.Popen[bytes]) -> Callable[[], bool]:
    def look() -> bool:
        assert process.poll() is None, log.read_text()
        return text in log.read_text()

    return look


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "tiny-gpt2/0: importing"), (signal.SIGTERM, "-- a trace")],
)
def test_an_interrupted_demo(
    number: signal.Signals,
    moment: str,
    environ: dict[str, str],
    tmp_path: Path,
    nothing_left: Callable[[], None],
) -> None:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            COMMAND,
            env=environ | {"PYTHONUNBUFFERED": "1"},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    wait_until(output_has(log, moment, process), TIMEOUT_S, moment)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # a terminal sends Ctrl-C to all in the foreground
    else:
        process.send_signal(number)
    assert process.wait(TIMEOUT_S) != Exit.OK
    nothing_left()


def test_a_closed_terminal(environ: dict[str, str], nothing_left: Callable[[], None]) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(COMMAND[0], COMMAND, environ)
    seen = b""
    while b"importing" not in seen:
        seen += os.read(terminal, 4096)
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] != 0
    nothing_left()
