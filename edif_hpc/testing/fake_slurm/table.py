"""The fake's memory: one JSON file of jobs and nodes below its folder, and one of faults, which a test may write.

Every program opens it under a lock, lets time pass (jobs that may start do, jobs whose time is over end) and writes it back.
Time is the machine's; nothing here waits.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GPUS_PER_NODE = 2
KILL_WAIT_S = 0.5
LISTED = ("PENDING", "RUNNING", "COMPLETING")


@dataclass(kw_only=True)
class Job:
    """One job, from its submission on for ever."""

    id: int
    name: str
    comment: str
    partition: str
    gpus: int
    time_min: int
    submit_at: float
    begin_at: float
    state: str = "PENDING"
    reason: str = "None"
    node: str = ""
    first_gpu: int = 0
    start_at: float | None = None
    end_at: float | None = None
    signal_lead_s: float | None = None
    requeue: bool = True
    restarts: int = 0
    held: bool = False
    cancelled: bool = False
    after: tuple[int, float] | None = (
        None  #: not before so many seconds after the start of that job
    )
    exclude: list[str] = field(default_factory=list)
    script: str = ""
    output: str = "/dev/null"
    folder: str = "/"
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def listed(self) -> bool:
        """Whether squeue shows it."""
        return self.state in LISTED


@dataclass(kw_only=True)
class Table:
    """All jobs and nodes. `runs`: jobs are processes, and what watches those ends them."""

    partitions: dict[str, list[str]]
    max_min: int
    runs: bool
    down: list[str] = field(default_factory=list)
    jobs: dict[int, Job] = field(default_factory=dict)

    def job(self, id_: int) -> Job | None:
        """A job that is still known."""
        return self.jobs.get(id_)

    def advance(self, now: float) -> None:
        """Let time pass until now."""
        for job in self.jobs.values():
            if job.state == "PENDING":
                self._try_to_start(job, now)
            elif not self.runs and job.state == "RUNNING" and (job.end_at or now) <= now:
                job.state = "TIMEOUT"

    def _try_to_start(self, job: Job, now: float) -> None:
        job.reason = self._reason(job, now)
        free = [] if job.reason != "None" else self._free_nodes(job)
        if not free:
            job.reason = "Resources" if job.reason == "None" else job.reason
            return
        job.node, job.first_gpu = free[0]
        job.state, job.reason = "RUNNING", "None"
        job.start_at, job.end_at = now, now + 60 * job.time_min

    def _reason(self, job: Job, now: float) -> str:
        if job.held:
            return "JobHeldUser"
        if job.time_min > self.max_min:
            return "PartitionTimeLimit"
        if now < job.begin_at:
            return "BeginTime"
        if job.after is not None:
            before = self.jobs.get(job.after[0])
            if before and (before.start_at is None or now < before.start_at + job.after[1]):
                return "Dependency"
        return "None"

    def _free_nodes(self, job: Job) -> list[tuple[str, int]]:
        found = []
        for node in self.partitions[job.partition]:
            if node in self.down or node in job.exclude:
                continue
            here = [
                each
                for each in self.jobs.values()
                if each.node == node and each.state in LISTED[1:]
            ]
            used = {each.first_gpu + number for each in here for number in range(each.gpus)}
            starts = (
                s
                for s in range(GPUS_PER_NODE - job.gpus + 1)
                if not used & set(range(s, s + job.gpus))
            )
            first = next(starts, None)
            if first is not None:
                found.append((node, first))
        return found


@contextmanager
def opened(root: Path) -> Iterator[Table]:
    """The table of a fake, for us alone; time has passed, and what is changed is kept."""
    with _locked(root):
        table = _read(root)
        table.advance(time.time())
        yield table
        _write(root, table)


def create(root: Path, table: Table) -> None:
    """A new table."""
    _write(root, table)
    (root / "faults.json").write_text("[]")


def take_fault(root: Path, program: str) -> dict[str, Any] | None:
    """The fault that a program is to have now, if any; one with `times` is used up."""
    with _locked(root):
        path = root / "faults.json"
        faults: list[dict[str, Any]] = json.loads(path.read_text())
        fault = next((each for each in faults if each["program"] in (program, "*")), None)
        if fault is not None and fault.get("times") is not None:
            fault["times"] -= 1
            if fault["times"] < 1:
                faults.remove(fault)
            path.write_text(json.dumps(faults))
        return fault


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(root: Path) -> Table:
    facts = json.loads((root / "table.json").read_text())
    facts["jobs"] = {int(id_): Job(**job) for id_, job in facts["jobs"].items()}
    return Table(**facts)


def _write(root: Path, table: Table) -> None:
    path = root / "table.json"
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(table)))
    temporary.replace(path)
