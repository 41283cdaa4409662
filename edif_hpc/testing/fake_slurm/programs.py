"""sbatch, sinfo, squeue, scancel, scontrol and srun: as much of them as we call, in the words of Slurm 22.05.

Before a program does its work it asks for a fault to have:

    hang                 it never answers
    hang_after           the same, but its work is done (a job that nobody was told of)
    socket_timed_out     the controller's answer did not come; nothing was done
    socket_timed_out_after   the same, but it was done
    unreachable          there is no controller
    empty                squeue says nothing, and ends well
    hold, late           sbatch: the job is held, or may not start for `seconds`
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from edif_hpc.testing.fake_slurm.table import GPUS_PER_NODE, Job, Table, opened, take_fault

_OPTIONS = frozenset(
    """account begin chdir comment constraint cpus-per-task dependency exclude export gres job-name kill-on-invalid-dep mem
    no-requeue nice nodes ntasks-per-node open-mode output partition qos reservation signal time""".split()  # noqa: SIM905
)
_ERRORS = {
    "socket_timed_out": "Socket timed out on send/recv operation",
    "unreachable": "Unable to contact slurm controller (connect failure)",
}
_INVALID = "Invalid job id specified"


class _Refused(Exception):
    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def main(program: str, root: Path, argv: list[str]) -> int:
    """Run one of the programs."""
    if program == "srun":
        _srun(root, argv)
    fault = take_fault(root, program) or {"kind": ""}
    if fault["kind"] == "hang":
        _hang()
    if fault["kind"] in _ERRORS:
        return _fail(program, _ERRORS[fault["kind"]])
    if fault["kind"] == "empty":
        return 0
    work = {
        "sbatch": _sbatch,
        "sinfo": _sinfo,
        "squeue": _squeue,
        "scancel": _scancel,
        "scontrol": _scontrol,
    }
    try:
        said = work[program](root, argv, fault)
    except _Refused as refused:
        sys.stderr.write(f"{refused}\n")
        return refused.code
    if fault["kind"] == "hang_after":
        _hang()
    if fault["kind"] == "socket_timed_out_after":
        return _fail(program, _ERRORS["socket_timed_out"])
    sys.stdout.write(said)
    return 0


def _fail(program: str, error: str) -> int:
    begin = (
        "sbatch: error: Batch job submission failed: "
        if program == "sbatch"
        else "slurm_load_jobs error: "
    )
    sys.stderr.write(f"{begin}{error}\n")
    return 1


def _hang() -> NoReturn:
    while True:
        signal.pause()


# -- sbatch --------------------------------------------------------------------------------------------------------------


def _sbatch(root: Path, argv: list[str], fault: dict[str, Any]) -> str:
    script = Path(argv[-1])
    options = _read_options(script.read_text())
    now = time.time()
    with opened(root) as table:
        job = _make_job(table, options, script, now)
        if "--test-only" in argv:
            sys.stderr.write(
                f"sbatch: Job {job.id} to start at {_stamp(now)} using {job.gpus} processors\n"
            )
            return ""
        job.held = fault["kind"] == "hold"
        if fault["kind"] == "late":
            job.begin_at = now + fault["seconds"]
        table.jobs[job.id] = job
        table.advance(now)
        runs = table.runs
    if runs:
        _watch(root, job.id)
    return f"Submitted batch job {job.id}\n"


def _read_options(script: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for line in script.splitlines():
        if line.startswith("#SBATCH "):
            word = shlex.split(line.removeprefix("#SBATCH "))[0]
            name, _, value = word.removeprefix("--").partition("=")
            if name not in _OPTIONS:
                raise _Refused(f"sbatch: unrecognized option '--{name}'", code=255)
            options[name] = value
    return options


def _make_job(table: Table, options: dict[str, str], script: Path, now: float) -> Job:
    partition = options.get("partition", "")
    if partition not in table.partitions:
        raise _refuse("Invalid partition name specified")
    _, kind, gpus = [*options.get("gres", "gpu::0").split(":"), "1"][:3]
    if (kind and kind != partition) or int(gpus) > GPUS_PER_NODE:
        raise _refuse("Requested node configuration is not available")
    exclude = [node for node in options.get("exclude", "").split(",") if node]
    if set(exclude) - {node for nodes in table.partitions.values() for node in nodes}:
        raise _refuse("Invalid node name specified")
    begin = re.fullmatch(r"now\+(\d+)", options.get("begin", "now+0"))
    after = re.fullmatch(r"after:(\d+)(?:\+(\d+))?", options.get("dependency", ""))
    name, _, lead = options.get("signal", "").partition("@")
    return Job(
        id=max(table.jobs, default=0) + 1,
        name=options.get("job-name", script.name),
        comment=options.get("comment", "(null)"),
        partition=partition,
        gpus=int(gpus),
        time_min=int(options.get("time", "1")),
        submit_at=now,
        begin_at=now + (float(begin[1]) if begin else 0.0),
        after=(int(after[1]), 60.0 * int(after[2] or 0)) if after else None,
        signal_lead_s=float(lead) if name == "USR2" else None,
        requeue="no-requeue" not in options,
        exclude=exclude,
        script=str(script),
        output=options.get("output", "/dev/null"),
        folder=options.get("chdir", "/"),
        environ={name: value for name, value in os.environ.items() if name.startswith("SLURM_")},
    )


def _refuse(why: str) -> _Refused:
    return _Refused(f"sbatch: error: Batch job submission failed: {why}")


def _watch(root: Path, job: int) -> None:
    """Start what runs the job, tied to nobody."""
    with (root / "watch.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "edif_hpc.testing.fake_slurm.watch", str(root), str(job)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/",
        )  # fmt: skip


# -- the others ------------------------------------------------------------------------------------------------------------


def _squeue(root: Path, argv: list[str], _fault: dict[str, Any]) -> str:
    form = argv[argv.index("-o") + 1]
    head = {"j": "NAME", "i": "JOBID", "T": "STATE", "r": "REASON", "N": "NODELIST", "S": "START_TIME", "L": "TIME_LEFT", "k": "COMMENT"}  # fmt: skip
    now = time.time()
    with opened(root) as table:
        rows = [head, *(_fields(job, now) for job in table.jobs.values() if job.listed)]
    return "".join(re.sub(r"%(\w)", lambda m: row[m[1]], form) + "\n" for row in rows)  # noqa: B023 - used at once


def _fields(job: Job, now: float) -> dict[str, str]:
    left = 60.0 * job.time_min if job.end_at is None else max(0.0, job.end_at - now)
    start = job.start_at or (job.begin_at if job.begin_at > now else None)
    return {
        "j": job.name, "i": str(job.id), "T": job.state, "r": job.reason, "N": job.node,
        "S": "N/A" if start is None else _stamp(start),
        "L": f"{int(left) // 60}:{int(left) % 60:02}", "k": job.comment,
    }  # fmt: skip


def _scancel(root: Path, argv: list[str], _fault: dict[str, Any]) -> str:
    name = next(
        (word.removeprefix("--name=") for word in argv if word.startswith("--name=")), None
    )
    with opened(root) as table:
        job = table.job(int(argv[-1]))
        if job is None or not job.listed:
            raise _Refused(f"scancel: error: Kill job error on job id {argv[-1]}: {_INVALID}")
        if name in (None, job.name):
            job.cancelled = True
            if not table.runs or job.state == "PENDING":
                job.state = "CANCELLED"
    return ""


def _sinfo(root: Path, argv: list[str], _fault: dict[str, Any]) -> str:
    """Nodes, grouped by what they have; 8 cores and 64000 MB each."""
    form = argv[argv.index("-o") + 1]
    with opened(root) as table:
        rows = [
            {
                "R": kind,
                "a": "up",
                "l": f"{table.max_min}:00",
                "D": str(len(nodes)),
                "c": "8",
                "m": "64000",
                "G": f"gpu:{kind}:{GPUS_PER_NODE}",
                "f": "(null)",
            }
            for kind, nodes in table.partitions.items()
        ]
    return "".join(re.sub(r"%(\w)", lambda m: row[m[1]], form) + "\n" for row in rows)  # noqa: B023 - used at once


def _scontrol(root: Path, argv: list[str], _fault: dict[str, Any]) -> str:
    with opened(root) as table:
        if argv[:2] == ["show", "config"]:
            return (
                "Configuration data as of 2026-11-21T16:32:25\nClusterName             = fake\nKillWait                = 30 sec\n"
                "SLURM_VERSION           = 22.05.8\nTmpFS                   = /tmp\n"
            )
        if argv[:2] == ["show", "partition"]:
            return "".join(
                f"PartitionName={kind} AllowAccounts=ALL AllowQos=ALL Default=NO MaxTime=00:{table.max_min:02}:00 State=UP\n"
                for kind in table.partitions
            )
    if argv[:2] != ["show", "job"]:
        raise _Refused(f"invalid keyword: {argv[0]}")
    with opened(root) as table:
        job = table.job(int(argv[-1]))
        if job is None:
            raise _Refused(f"slurm_load_jobs error: {_INVALID}")
        end = "Unknown" if job.end_at is None else _stamp(job.end_at)
        return (
            f"JobId={job.id} JobName={job.name} JobState={job.state} Reason={job.reason} Restarts={job.restarts} "
            f"Requeue={int(job.requeue)} EndTime={end} NodeList={job.node or '(null)'} Comment={job.comment}\n"
        )


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S")


# -- srun, inside a job ------------------------------------------------------------------------------------------------------


def _srun(root: Path, argv: list[str]) -> NoReturn:
    """Become the step: its output to its file, its pid where the job's watcher finds it."""
    words = list(argv)
    output = os.devnull
    while words and words[0].startswith("--"):
        option = words.pop(0)
        if option == "--output":
            output = words.pop(0)
    job = os.environ["SLURM_JOB_ID"]
    target = output.replace("%j", job).replace("%t", "0")
    with open(target, "ab") as file:  # noqa: PTH123 - a path of Slurm's own pattern
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_STEP_ID": "0",
    }
    (root / f"step-{job}").write_text(str(os.getpid()))
    os.execvp(words[0], words)  # noqa: S606 - as srun does
