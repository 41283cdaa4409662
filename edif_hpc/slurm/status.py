"""What Slurm says of our jobs: one listing, read from `squeue`, and a few questions about one job.

A listing has three kinds of answer for an allocation: it is there, it is not there, or Slurm could not be asked. The third is
`SlurmUnavailable` and never an empty list: whoever takes a silent controller for the end of all jobs submits them all anew.
Therefore squeue's headline is asked for, which it prints whenever it has an answer, even if that has no jobs.

Only jobs whose name (or comment, should a site rename jobs) is one of ours, `edif-…`, count; a person's other jobs are never seen,
whatever their names and comments hold: also line breaks, so that what they spread over several lines is passed over. An ended job leaves the listing at once. States are Slurm's words in small letters; new ones appear with new releases, and
whatever is listed is alive.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from edif_hpc.clock import Clock, SystemClock
from edif_hpc.errors import InvalidInput, SlurmUnavailable
from edif_hpc.slurm.commands import Run, Runner
from edif_hpc.slurm.site import Site

PREFIX: Final = "edif-"
ASK_TIMEOUT_S: Final = 20.0
#: name, id, state, reason, nodes, start or its estimate, time left; the comment last, since it may hold anything
FORMAT: Final = "%j|%i|%T|%r|%N|%S|%L|%k"
_HEADLINE = "NAME|JOBID|STATE|"
_FIELDS = 8
_WORDS = 400  #: of a reason, which may list all nodes of a cluster
_WAITING = {"pending", "requeued", "requeue_fed", "requeue_hold", "special_exit", "resv_del_hold"}
_OVER = ("invalid job id", "already completing or completed", "already finished")
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?", re.ASCII)
_OURS = re.compile(rf"{PREFIX}[a-z0-9-]{{1,80}}-[0-9a-f]{{2,16}}", re.ASCII)
_LEFT = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", re.ASCII)
_END_TIME = re.compile(r"(?:^|\s)EndTime=(\S+)")


@dataclass(frozen=True, kw_only=True)
class JobLine:
    """One of our jobs, as a listing shows it."""

    name: str
    job_id: str
    state: str  #: pending, running, completing, …
    reason: str = ""  #: why it is pending
    node: str | None = None
    start_in_s: float | None = None  #: Slurm's estimate, for one that is pending
    left_s: float | None = None  #: of its walltime, once it has started


class Slurm:
    """Asks the Slurm of a site. Every call is one program and takes at most `timeout_s`."""

    def __init__(
        self,
        site: Site,
        *,
        run: Run | None = None,
        clock: Clock | None = None,
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> None:
        self._site = site
        self._run = run or Runner()
        self._clock = clock or SystemClock()
        self._timeout_s = timeout_s

    def list_jobs(self) -> list[JobLine]:
        """All our jobs that wait or run.

        Raises:
            SlurmUnavailable: Slurm did not answer; nothing is known.
        """
        # Partitions may be hidden; jobs in them are ours all the same.
        said = self._ask("squeue", "--me", "--all", "-o", FORMAT)
        return read_listing(said, now=self._clock.wall())

    def find(self, name: str) -> JobLine | None:
        """The job of that name; None if a full listing has none. Of several the oldest, which is the one that counts."""
        found = [each for each in self.list_jobs() if each.name == name]
        return min(found, key=lambda each: (len(each.job_id), each.job_id), default=None)

    def cancel(self, job_id: str, *, name: str) -> None:
        """End a job, if it has that name; nothing happens if it is over.

        Raises:
            SlurmUnavailable: it could not be told.
        """
        _check_id(job_id)
        try:
            self._ask("scancel", f"--name={name}", job_id)
        except SlurmUnavailable as error:
            if not any(words in str(error).lower() for words in _OVER):
                raise

    def left_s(self, job_id: str) -> float | None:
        """How long until a running job's granted end, which an administrator may move; None if Slurm knows of none."""
        _check_id(job_id)
        try:
            said = self._ask("scontrol", "show", "job", "-o", job_id)
        except SlurmUnavailable as error:
            if not any(words in str(error).lower() for words in _OVER):
                raise
            return None
        end = _END_TIME.search(said)
        at = None if end is None else _read_time(end[1])
        return None if at is None else max(0.0, at - self._clock.wall())

    def _ask(self, *argv: str) -> str:
        try:
            answer = self._run(argv, timeout_s=self._timeout_s)
        except OSError as error:
            raise SlurmUnavailable(f"{argv[0]} on {self._site.name}: {error}") from error
        if answer.code != 0:
            said = answer.err or answer.out.strip() or "it said nothing"
            raise SlurmUnavailable(
                f"{argv[0]} on {self._site.name} ended with {answer.code}: {said}"
            )
        return answer.out


def read_listing(text: str, *, now: float) -> list[JobLine]:
    """Our jobs in what squeue printed in `FORMAT`.

    Raises:
        SlurmUnavailable: this is not a listing.
    """
    headline, *lines = text.split("\n")
    if not headline.startswith(_HEADLINE):
        raise SlurmUnavailable(f"squeue printed no listing; its first line is {headline[:80]!r}")
    if lines.pop() if lines else headline:
        raise SlurmUnavailable(f"squeue printed half a listing; it ends with {text[-80:]!r}")
    found = (_read_line(line, now) for line in lines)
    return [each for each in found if each is not None]


def _read_line(line: str, now: float) -> JobLine | None:
    """One of our jobs; None for anything else."""
    fields = [each.strip() for each in line.split("|", _FIELDS - 1)]
    if len(fields) < _FIELDS:
        return None  # a piece of somebody's comment
    name, job_id, state, reason, node, start, left, comment = fields
    if not job_id[:1].isdigit():
        return None  # a name with a stroke in it
    ours = next((each for each in (name, comment) if _OURS.fullmatch(each)), None)
    if ours is None:
        return None
    state = state.lower()
    waits = state in _WAITING
    start_at = _read_time(start) if waits else None
    return JobLine(
        name=ours,
        job_id=job_id,
        state=state,
        reason="" if reason == "None" else reason[:_WORDS],
        node=node[:_WORDS] or None,
        start_in_s=None if start_at is None else max(0.0, start_at - now),
        left_s=None if waits else read_duration(left),
    )


def read_duration(text: str) -> float | None:
    """Seconds of Slurm's [days-][hours:]minutes:seconds; None for UNLIMITED, NOT_SET and the like."""
    match = _LEFT.fullmatch(text.strip())
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def _read_time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()
    except ValueError:  # N/A, Unknown, NONE
        return None


def _check_id(job_id: str) -> None:
    if _JOB_ID.fullmatch(job_id) is None:
        raise InvalidInput(f"{job_id!r} is no job id of Slurm")
