"""Hand an allocation to a scheduler.

What is submitted is always the same callable, `entry.enter`, with the path of an order: a 0600 file that tells the pilot
what to do. submitit submits it, and does nothing else. It is not asked for states (it knows none without accounting) and its
result files are never read (they are pickles in a folder); what an allocation does is told by its pilot, and by `status`.
submitit runs in a process of its own (`submitting`), in a new session: so a submission that hangs can be given up, and
neither Ctrl-C nor a closed terminal reaches what was started.

On Slurm a submission has three ends. It gives the job's id; or `SubmitRefused`, and then there is no job; or `SubmitUnknown`,
and then there may be one: it is found by its name, which is therefore different for every allocation, and is as good as any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

import msgspec

from edif_hpc.errors import LaunchError, SubmitRefused, SubmitUnknown
from edif_hpc.slurm.commands import Run, Runner
from edif_hpc.slurm.entry import PILOT
from edif_hpc.slurm.refusals import refusal
from edif_hpc.slurm.site import Site

SUBMIT_TIMEOUT_S: Final = 60.0
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*", re.ASCII)
_DEPENDENCY = re.compile(r"[a-z]+:[0-9]+(\+[0-9]+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An order to a scheduler. `walltime_min` None means no limit (a year on the local site; Slurm needs one)."""

    name: str  #: the job's name, and its comment
    order: Path
    folder: Path  #: for this allocation alone: its log and what submitit writes
    walltime_min: int | None = None
    signal_lead_s: int = 120  #: how long before the end of its walltime it gets SIGUSR2, at least
    partition: str | None = None
    gres: str | None = None
    cpus: int = 1
    mem_gb: int | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: tuple[str, ...] = ()  #: nodes that it must not run on
    begin_after_s: float = 0.0
    dependency: str | None = None
    extra: Mapping[str, str] = field(default_factory=dict)  #: more long options of sbatch
    module: str = PILOT  #: what runs, with the order's path as its argument

    def __post_init__(self) -> None:
        # Some of these come from the relay, and all of them end up in a script that bash reads.
        for word in (self.name, *self.exclude):
            if _WORD.fullmatch(word) is None:
                raise SubmitRefused(
                    f"{word!r} cannot be the name of an allocation or of a node", kind="config"
                )
        if self.dependency is not None and _DEPENDENCY.fullmatch(self.dependency) is None:
            raise SubmitRefused(
                f"{self.dependency!r} is no dependency; it must look like after:17+30",
                kind="config",
            )


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What the process that knows submitit is to do."""

    submission: Submission
    site: Site | None = None  #: None is this machine
    test_only: bool = False


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What it did: `done` with an id; `sbatch` with what sbatch said against it; `unable` before anything was submitted."""

    kind: Literal["done", "sbatch", "unable", "lost"]
    text: str


class Submitter(Protocol):
    """A site's way to submit."""

    def submit(self, submission: Submission) -> str:
        """Submit and return the scheduler's id; `LaunchError` with what was observed."""


def submission_for(
    site: Site,
    *,
    gpu: str | None,
    gpus: int,
    walltime_min: int,
    **rest: Any,
) -> Submission:
    """A submission to a Slurm site: what the site file says of a GPU, times how many.

    `rest` are the other fields of `Submission`; `gpu` may be None where there is only one kind.

    Raises:
        SubmitRefused: the site has no such GPU, or not for so long.
    """
    names = [gpu] if gpu is not None else list(site.gpus)
    if len(names) != 1 or names[0] not in site.gpus:
        raise SubmitRefused(
            f"the site {site.name} has no GPU called {gpu!r}; it has: {', '.join(site.gpus)}", kind="config"
        )  # fmt: skip
    facts = site.gpus[names[0]]
    if walltime_min > facts.max_walltime_min:
        raise SubmitRefused(
            f"{walltime_min} min on {names[0]} of {site.name}: at most {facts.max_walltime_min} min are allowed there",
            kind="config",
        )
    return Submission(
        walltime_min=walltime_min,
        partition=facts.partition,
        gres=f"{facts.gres}:{gpus}" if gpus else None,
        cpus=facts.cpus * max(1, gpus),
        mem_gb=facts.mem_gb * max(1, gpus),
        account=facts.account,
        qos=facts.qos,
        constraint=facts.constraint,
        reservation=facts.reservation,
        extra=facts.options,
        **rest,
    )


class LocalSubmitter:
    """The `local` site: a process on this machine, outlived by nothing and tied to no terminal."""

    def submit(self, submission: Submission) -> str:
        """Submit through submitit's local executor, in a session of its own."""
        check_folder(submission.folder)
        try:
            done = subprocess.run(
                [sys.executable, "-m", "edif_hpc.slurm.submitting"],
                input=_encode(Task(submission=submission)),
                capture_output=True,
                text=True,
                start_new_session=True,
                check=False,
                timeout=SUBMIT_TIMEOUT_S,
            )
        except subprocess.TimeoutExpired as error:
            raise LaunchError(
                f"submitit did not answer within {SUBMIT_TIMEOUT_S:.0f} s for {submission.name}; its folder: {submission.folder}"
            ) from error
        outcome = _outcome(done.stdout, done.stderr)
        if outcome.kind != "done":
            raise LaunchError(
                f"submitit could not start {submission.name} (exit {done.returncode}): {outcome.text}"
            )
        return outcome.text


class SlurmSubmitter:
    """A site with Slurm. `run` is how its programs are started."""

    def __init__(
        self, site: Site, *, run: Run | None = None, timeout_s: float = SUBMIT_TIMEOUT_S
    ) -> None:
        self._site = site
        self._run = run or Runner()
        self._timeout_s = timeout_s

    def submit(self, submission: Submission) -> str:
        """Submit; returns the job's id.

        Raises:
            SubmitRefused: there is no job.
            SubmitUnknown: there may be one; look for its name before another try.
        """
        return self._ask(Task(submission=submission, site=self._site))

    def test_only(self, submission: Submission) -> str:
        """Ask Slurm whether it would take a submission, without making it; returns its estimate, in its own words.

        Raises:
            SubmitRefused: it would not.
            SubmitUnknown: it did not say.
        """
        return self._ask(Task(submission=submission, site=self._site, test_only=True))

    def _ask(self, task: Task) -> str:
        name = task.submission.name
        if task.submission.walltime_min is None:
            raise SubmitRefused(f"{name} has no walltime, and Slurm needs one", kind="config")
        try:
            answer = self._run(
                [sys.executable, "-m", "edif_hpc.slurm.submitting"],
                timeout_s=self._timeout_s,
                stdin=_encode(task),
            )
        except TimeoutError as error:
            raise SubmitUnknown(
                f"sbatch did not answer within {self._timeout_s:g} s for {name}"
            ) from error
        except OSError as error:
            raise SubmitRefused(
                f"{name} could not be submitted: {error}", kind="config"
            ) from error
        outcome = _outcome(answer.out, answer.err)
        match outcome.kind:
            case "done":
                return outcome.text
            case "unable":
                raise SubmitRefused(f"{name}: {outcome.text}", kind="config")
            case "sbatch":
                raise refusal(outcome.text)
            case "lost":
                raise SubmitUnknown(
                    f"submitting {name} ended with {answer.code} and no outcome: {outcome.text}"
                )


def check_folder(folder: Path) -> None:
    """Make a folder for the owner alone; refuse one that others may write: what lies in it is executed."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    facts = folder.stat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise LaunchError(
            f"others may write to {folder}, and what lies there is executed; chmod 700 it, or choose another folder"
        )


def _encode(task: Task) -> str:
    return msgspec.json.encode(task, enc_hook=str).decode()


def _outcome(out: str, err: str) -> Outcome:
    try:
        return msgspec.json.decode(out, type=Outcome)
    except msgspec.DecodeError:
        return Outcome(kind="lost", text=(err.strip().splitlines() or ["it said nothing"])[-1])
