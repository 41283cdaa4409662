"""A wall that is not there is found by trying to get through."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.testing.absent import absent

#: In a process of its own, with nothing to read but what an engine's has.
PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from edif_hpc.errors import EngineError
from edif_hpc.testing.leaky_zygote import LeakyJail
from edif_hpc.worker.engine.walls.probing import probe
from edif_hpc.worker.engine.values import Level
jail = partial(LeakyJail, without=frozenset(sys.argv[2].split(",")))
try:
    layers, missing = probe(Path(sys.argv[1]), ceiling=Level.FULL, floor=Level.PROCESS, make_jail=jail)
    print(layers.level, "; ".join(missing), sep="|")
except EngineError as error:
    print("none", error, sep="|")
"""


def probed(scratch: Path, without: str) -> tuple[str, str]:
    command = [sys.executable, "-P", "-c", PROGRAM, str(scratch), without]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    level, _, missing = done.stdout.strip().partition("|")
    assert level, done.stderr
    return level, missing


@pytest.mark.parametrize(
    ("wall", "found"),
    [
        ("namespaces", "seeing other processes"),
        ("proc", "seeing other processes"),
        ("scratch", "files beyond the scratch"),
        ("privileges", "gaining a capability"),
        ("limits", "opening more files"),
        ("landlock", "listing another folder"),
        ("seccomp", "a socket of AF_INET"),
    ],
)
def test_a_wall_that_is_missing_is_found(tmp_path: Path, wall: str, found: str) -> None:
    level, missing = probed(tmp_path, "")
    if level != "full":
        absent(f"not to be had here: {missing}")
    level, missing = probed(tmp_path, wall)
    assert level != "full"
    refused = missing.partition("full: ")[2].partition("; ")[0]
    assert refused.startswith("not denied")
    assert found in refused
    assert [*tmp_path.iterdir()] == []
