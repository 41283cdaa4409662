"""Nothing is left behind: not what a child left behind either, nor what will not listen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.cli import children
from edif_hpc.errors import LaunchError

# Adopting orphans is for the rest of a process's life, so it is done in one of its own.
PROGRAM = """
import json, os, subprocess, sys, time
from edif_hpc.cli import children
children.adopt_orphans()
code = '''
import signal, sys, time
if sys.argv[2] == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
open(sys.argv[1] + "/" + sys.argv[2], "w").close()
time.sleep(60)
'''
folder = sys.argv[1]
for name in ("kind", "deaf"):
    inner = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}, {folder!r}, {name!r}], start_new_session=True)"
    subprocess.run([sys.executable, "-c", inner], check=True)
while not all(os.path.exists(f"{folder}/{name}") for name in ("kind", "deaf")):
    time.sleep(0.01)
before = [each.pid for each in children.children()]
killed = [each.pid for each in children.end_children(0.5)]
print(json.dumps([before, killed, [each.pid for each in children.children()]]))
"""


def test_orphans_are_found_and_ended_also_the_deaf(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    before, killed, after = json.loads(done.stdout)
    assert len(before) == 2
    assert len(killed) == 1
    assert after == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in before)


def test_a_process_is_more_than_its_number() -> None:
    me = children.Process.of(os.getpid())
    assert me is not None
    assert me.alive
    assert not children.Process(pid=me.pid, started=me.started - 1).alive


def test_a_process_that_has_ended_is_none() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert children.Process.of(process.pid) is None


def test_start_returns_the_line_that_says_ready(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = children.start(
        ["http.server", "--bind", "127.0.0.1", "0"],
        environ=dict(os.environ),
        log=log,
        until="http://",
        timeout_s=20,
    )
    assert "127.0.0.1" in line
    [server] = [
        each
        for each in children.children()
        if b"http.server" in Path(f"/proc/{each.pid}/cmdline").read_bytes()
    ]
    children.end([server], 10)
    assert not server.alive


def test_start_tells_the_last_words_of_what_ended(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"no_such_module .*ended: .*No module named"):
        children.start(
            ["no_such_module"],
            environ=dict(os.environ),
            log=tmp_path / "log",
            until="x",
            timeout_s=20,
        )
