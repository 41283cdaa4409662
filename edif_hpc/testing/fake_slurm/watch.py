"""What runs one job of the fake: `python -m edif_hpc.testing.fake_slurm.watch ROOT JOB`.

It stands for slurmd and the controller's timers: starts the batch script when the job may start, signals its step before the
end, ends it when its time is over, when it is cancelled or when its node is lost, and notes how it ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from edif_hpc.testing.fake_slurm.table import KILL_WAIT_S, Job, opened

_TICK_S = 0.02
_VISIBLE = {"mi300x": "ROCR_VISIBLE_DEVICES"}


class Watch:
    """The life of one job."""

    def __init__(self, root: Path, job: int) -> None:
        self._root = root
        self._id = job
        self._process: subprocess.Popen[bytes] | None = None
        self._signalled = False
        self._kill_at: float | None = None
        self._verdict = ""

    def step(self) -> bool:
        """Look once; False if the job is over."""
        now = time.time()
        with opened(self._root) as table:
            job = table.jobs[self._id]
            if job.state == "RUNNING" and self._process is None:
                self._start(job)
            if self._process is not None:
                self._look(job, now, node_lost=job.node in table.down)
            return job.listed

    def _start(self, job: Job) -> None:
        gpus = ",".join(str(job.first_gpu + number) for number in range(job.gpus))
        environ = job.environ | {
            "SLURM_JOB_ID": str(job.id), "SLURM_JOBID": str(job.id), "SLURM_JOB_NAME": job.name,
            "SLURM_JOB_PARTITION": job.partition, "SLURM_JOB_NODELIST": job.node, "SLURMD_NODENAME": job.node,
            "SLURM_NODEID": "0", "SLURM_JOB_NUM_NODES": "1", _VISIBLE.get(job.partition, "CUDA_VISIBLE_DEVICES"): gpus,
        }  # fmt: skip
        if job.restarts:
            environ["SLURM_RESTART_COUNT"] = str(job.restarts)
        with open(job.output.replace("%j", str(job.id)), "ab") as out:  # noqa: PTH123 - a path of Slurm's own pattern
            self._process = subprocess.Popen(
                ["bash", job.script],  # noqa: S607 - found by PATH, as Slurm's jobs are
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environ, cwd=job.folder, start_new_session=True,
            )  # fmt: skip

    def _look(self, job: Job, now: float, *, node_lost: bool) -> None:
        code = self._process.poll() if self._process else None
        if code is not None:
            self._kill()  # and whatever it left behind
            self._ended(job, code)
        elif node_lost:
            self._verdict = "NODE_FAIL"
            self._kill()
        elif not self._verdict and (job.cancelled or now >= (job.end_at or now)):
            self._verdict = "CANCELLED" if job.cancelled else "TIMEOUT"
            job.state = "COMPLETING"
            self._signal_step(signal.SIGTERM)
            self._kill_at = now + KILL_WAIT_S
        elif self._kill_at is not None and now >= self._kill_at:
            self._kill()
        elif self._is_due(job, now):
            self._signalled = self._signal_step(signal.SIGUSR2)

    def _is_due(self, job: Job, now: float) -> bool:
        """Whether the signal before the end is to be sent now."""
        if self._signalled or self._verdict or job.signal_lead_s is None or job.end_at is None:
            return False
        return now >= job.end_at - job.signal_lead_s

    def _ended(self, job: Job, code: int) -> None:
        self._process = None
        (self._root / f"step-{job.id}").unlink(missing_ok=True)
        if self._verdict == "NODE_FAIL" and job.requeue:
            job.state, job.node, job.start_at, job.end_at = "PENDING", "", None, None
            job.restarts += 1
            self._verdict, self._signalled = "", False
            return
        job.state = self._verdict or ("COMPLETED" if code == 0 else "FAILED")

    def _signal_step(self, number: signal.Signals) -> bool:
        try:
            pid = int((self._root / f"step-{self._id}").read_text())
            os.kill(pid, number)
        except (FileNotFoundError, ProcessLookupError, ValueError):
            return False  # not yet, or no more
        return True

    def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


def main(argv: list[str]) -> int:
    """Run one job to its end."""
    watch = Watch(Path(argv[1]), int(argv[2]))
    while watch.step():
        time.sleep(_TICK_S)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
