"""The only door to submitit: hand an allocation to a scheduler.

What is submitted is always the same callable, `entry.enter`, with the path of an order: a 0600 file that tells the pilot
what to do. submitit is asked to submit and for nothing else. It is not asked for states (it knows none without accounting)
and its result files are never read (they are pickles in a folder); what an allocation does is told by its pilot.

On the `local` site submitit's local executor starts the pilot on this machine. `detached` runs the submission itself in a
new session, so that neither Ctrl-C nor a closed terminal reaches what it started.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edif_hpc.errors import LaunchError
from edif_hpc.slurm.entry import enter

_YEAR_MIN = 365 * 24 * 60
_SUBMIT_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An order to a scheduler. `walltime_min` None means no limit (a year on the local site)."""

    name: str
    order: Path
    folder: Path
    walltime_min: int | None = None
    signal_lead_s: int = 120


class Submitter(Protocol):
    """A site's way to submit."""

    def submit(self, submission: Submission) -> str:
        """Submit and return the scheduler's id; `LaunchError` with what was observed."""


class LocalSubmitter:
    """The `local` site: a process on this machine, outlived by nothing and tied to no terminal."""

    def submit(self, submission: Submission) -> str:
        """Submit through submitit's local executor, in a session of its own."""
        check_folder(submission.folder)
        spec = {
            "name": submission.name,
            "order": str(submission.order),
            "folder": str(submission.folder),
            "walltime_min": submission.walltime_min,
            "signal_lead_s": submission.signal_lead_s,
        }
        try:
            done = subprocess.run(
                [sys.executable, "-m", "edif_hpc.slurm.submit"],
                input=json.dumps(spec),
                capture_output=True,
                text=True,
                start_new_session=True,
                check=False,
                timeout=_SUBMIT_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise LaunchError(
                f"submitit did not answer within {_SUBMIT_TIMEOUT_S:.0f} s for {submission.name}; its folder: {submission.folder}"
            ) from error
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["no output"]
            raise LaunchError(
                f"submitit could not start {submission.name} (exit {done.returncode}): {last[0]}"
            )
        return done.stdout.strip()


def check_folder(folder: Path) -> None:
    """Make a folder for the owner alone; refuse one that others may write: what lies in it is executed."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise LaunchError(
            f"others may write to {folder}, and what lies there is executed; chmod 700 it, or choose another folder"
        )


def _submit_local(spec: dict[str, str | int | None]) -> str:
    import submitit  # noqa: PLC0415 - heavy, and needed in this short-lived process alone

    executor = submitit.LocalExecutor(folder=str(spec["folder"]))
    walltime = spec["walltime_min"] or _YEAR_MIN
    executor.update_parameters(
        name=spec["name"],
        timeout_min=walltime,
        signal_delay_s=spec["signal_lead_s"],
        stderr_to_stdout=True,
    )
    return str(executor.submit(enter, str(spec["order"])).job_id)


def _main() -> None:
    # What submitit starts inherits our descriptors and would keep the caller's pipes open: give it a log instead.
    answer = os.fdopen(os.dup(1), "w")
    spec = json.load(sys.stdin)
    log = os.open(
        Path(spec["folder"]) / "submit.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600
    )
    error = os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        answer.write(_submit_local(spec))
    except BaseException as fault:
        os.write(error, f"{type(fault).__name__}: {fault}\n".encode())
        raise
    answer.close()
    os._exit(0)  # submitit ends its jobs when their object dies; they are to live on


if __name__ == "__main__":
    _main()
