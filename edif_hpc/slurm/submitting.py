"""The only door to submitit, and a process of its own: `python -m edif_hpc.slurm.submitting`, a task in, an outcome out.

submitit writes a batch script and a pickle of what is to be called, gives the script to sbatch, reads the job's id from the
answer, and only then renames the pickle to what the job will look for. Each of these steps may be the last one of this
process, since it is killed when it takes too long; so the script has a line that takes the pickle if the renaming never came,
and one that says which order is meant, should it be another submission's pickle.

Of what submitit does besides, little is wanted: it is not to requeue, not to name a wckey, not to hand our environment on,
and its handlers of signals go when `entry.enter` replaces the process that it started.
"""

from __future__ import annotations

import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from edif_hpc.errors import LaunchError
from edif_hpc.slurm.commands import own_environ
from edif_hpc.slurm.entry import ORDER, enter
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.submit import Outcome, Submission, Task, check_folder

_YEAR_MIN = 365 * 24 * 60
_MOST_LEAD_S = 65535
_EARLY_S = 60
#: What a job gets of the submitter's environment. Everything else, with its secrets, stays behind.
_EXPORTED = ("PATH", "HOME", "USER", "LOGNAME", "LANG")


def _carry_out(task: Task) -> Outcome:
    from submitit.core.utils import FailedJobError  # noqa: PLC0415 - heavy, and needed in this short-lived process alone

    submission = task.submission
    try:
        if task.site is None:
            return Outcome(kind="done", text=_submit_local(submission))
        executor = _slurm_executor(submission, task.site)
    except (OSError, RuntimeError) as error:  # there is no srun, say
        return Outcome(kind="unable", text=str(error))
    try:
        if task.test_only:
            return _test_only(executor.script(), submission.folder)
        return Outcome(kind="done", text=_submit(executor, submission))
    except FailedJobError as error:
        return Outcome(kind="sbatch", text=str(error))


def _submit(executor: Any, submission: Submission) -> str:
    return str(executor.submit(enter, str(submission.order), submission.module).job_id)


def _submit_local(submission: Submission) -> str:
    import submitit  # noqa: PLC0415 - heavy, and needed in this short-lived process alone

    executor = submitit.LocalExecutor(folder=str(submission.folder))
    executor.update_parameters(
        name=submission.name,
        timeout_min=submission.walltime_min or _YEAR_MIN,
        signal_delay_s=submission.signal_lead_s,
        stderr_to_stdout=True,
    )
    return _submit(executor, submission)


def _slurm_executor(submission: Submission, site: Site) -> Any:
    import submitit  # noqa: PLC0415 - heavy, and needed in this short-lived process alone

    class Executor(submitit.SlurmExecutor):
        def script(self) -> str:
            """What sbatch would be given."""
            return self._make_submission_file_text(self._submitit_command_str, "test")

    python = shlex.quote(site.python or sys.executable)
    executor = Executor(folder=str(submission.folder), max_num_timeout=0, python=python)
    asked = {
        "partition": submission.partition,
        "gres": submission.gres,
        "mem": f"{submission.mem_gb}GB" if submission.mem_gb else None,
        "account": submission.account,
        "qos": submission.qos,
        "constraint": submission.constraint,
        "exclude": ",".join(submission.exclude) or None,
        "dependency": submission.dependency,
    }
    executor.update_parameters(
        job_name=submission.name,
        comment=submission.name,
        time=submission.walltime_min,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=submission.cpus,
        signal_delay_s=signal_lead_s(submission),
        stderr_to_stdout=True,
        wckey=None,  # submitit would name its own, and clusters that account by wckey refuse unknown ones
        setup=_setup(submission, site),
        # srun takes neither the cores nor the environment of the batch script by itself.
        srun_args=[f"--cpus-per-task={submission.cpus}", "--export=ALL", "--mpi=none"],
        additional_parameters=_more_options(submission),
        **{name: value for name, value in asked.items() if value is not None},
    )
    return executor


def signal_lead_s(submission: Submission) -> int:
    """The lead of the signal: Slurm sends it up to a minute early, and a job that has just started must not get it."""
    most = (60 * (submission.walltime_min or 0) - _EARLY_S) // 2
    return max(1, min(submission.signal_lead_s, most, _MOST_LEAD_S))


def _more_options(submission: Submission) -> dict[str, str | bool]:
    options: dict[str, str | bool] = {
        "no-requeue": True,  # a lost allocation is replaced, never run again
        "open-mode": "append",
        "export": "NIL",
        "chdir": str(submission.folder),
    }
    if submission.begin_after_s > 0:
        options["begin"] = f"now+{math.ceil(submission.begin_after_s)}"
    if submission.dependency is not None:
        options["kill-on-invalid-dep"] = "yes"
    if submission.reservation is not None:
        options["reservation"] = submission.reservation
    return options | {name: text or True for name, text in submission.extra.items()}


def _setup(submission: Submission, site: Site) -> list[str]:
    """Lines of the batch script before the pilot."""
    environ = own_environ()
    exports = [
        f"export {name}={shlex.quote(environ[name])}" for name in _EXPORTED if name in environ
    ]
    site_lines = ["[ ! -r /etc/profile ] || . /etc/profile", *site.setup] if site.setup else []
    # submitit names its file after the job once sbatch has told the id. If it was given up before, the file is still here.
    folder = shlex.quote(str(submission.folder))
    own = f"{folder}/${{SLURM_JOB_ID}}_submitted.pkl"
    adopt = f"find {folder} -maxdepth 1 -name '*.pkl' ! -name '*_*' -exec cp -n {{}} {own} \\; 2>/dev/null"
    order = f"export {ORDER}={shlex.quote(str(submission.order))}"
    return [*exports, *site_lines, order, adopt]


def _test_only(script: str, folder: Path) -> Outcome:
    path = folder / "test-only.sh"
    path.write_text(script)
    done = subprocess.run(  # noqa: S603 - our own script
        ["sbatch", "--test-only", str(path)],  # noqa: S607 - found by PATH, as submitit does
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    path.unlink()
    said = done.stderr.strip() or done.stdout.strip()
    return Outcome(kind="sbatch" if done.returncode else "done", text=said)


def _main() -> None:
    # What submitit starts inherits our descriptors and would keep the caller's pipes open: give it a log instead.
    answer = os.fdopen(os.dup(1), "wb")
    task = msgspec.json.decode(
        sys.stdin.buffer.read(), type=Task, dec_hook=lambda kind, text: kind(text)
    )
    try:
        check_folder(task.submission.folder)
        path = task.submission.folder / "submit.log"
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except (LaunchError, OSError) as error:
        outcome = Outcome(kind="unable", text=str(error))
    else:
        os.dup2(log, 1)
        os.dup2(log, 2)
        outcome = _carry_out(task)
    answer.write(msgspec.json.encode(outcome))
    answer.close()
    os._exit(0)  # submitit ends its jobs when their object dies; they are to live on


if __name__ == "__main__":
    _main()
