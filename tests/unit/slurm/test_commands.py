from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edif_hpc.slurm.commands import Runner, clean
from edif_hpc.testing.processes import is_alive
from edif_hpc.testing.wait import wait_until

PATH = {"PATH": "/usr/bin:/bin"}


def test_nothing_of_an_environment_changes_an_answer() -> None:
    profile = {"SQUEUE_STATES": "R", "SBATCH_PARTITION": "x", "SLURM_JOB_ID": "7", "SUBMITIT_PREEMPT_SIGNAL": "USR1"}  # fmt: skip
    given = PATH | profile | {"SLURM_CONF": "/etc/slurm.conf", "SLURM_TIME_FORMAT": "relative", "TZ": "Asia/Tokyo"}  # fmt: skip
    assert clean(given) == PATH | {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_TIME_FORMAT": "standard",
        "TZ": "UTC",
    }


def test_an_answer() -> None:
    program = "import sys, os; print(sys.stdin.read(), os.environ['TZ']); sys.stderr.write('no\\n'); sys.exit(3)"
    answer = Runner(environ=PATH)([sys.executable, "-c", program], timeout_s=20, stdin="hello")
    assert (answer.code, answer.out, answer.err) == (3, "hello UTC\n", "no")


def test_what_does_not_answer_is_killed_with_its_children(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $$ $! > {pids}; wait"
    with pytest.raises(TimeoutError, match=r"sh did not answer within 0\.5 s"):
        Runner(environ=PATH)(["sh", "-c", script], timeout_s=0.5)
    left = [int(pid) for pid in pids.read_text().split()]
    wait_until(lambda: not any(is_alive(pid) for pid in left), 5, "both are gone")


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(FileNotFoundError):
        Runner(environ=PATH)(["no-such-program"], timeout_s=1)
