"""A fake Slurm: its programs, put before all others in the PATH, over a table of jobs in a folder.

It has what a real one seldom shows: an sbatch that submits and does not say so, a squeue with nothing to say, a job that is
held, late, or run again under its old number. Jobs are rows of a table; with `runs` they are processes too. It passes the same
contract suite as the real one (`edif_hpc.testing.slurm`), and starts in no time, as any user.

    with fake_slurm(tmp_path / "slurm") as cluster:
        cluster.fault("squeue", "empty")
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.slurm.commands import Runner
from edif_hpc.slurm.order import Vendor
from edif_hpc.slurm.site import Gpu, Site
from edif_hpc.testing.fake_slurm.table import Job, Table, create, opened
from edif_hpc.testing.processes import processes_of
from edif_hpc.testing.wait import wait_until

PROGRAMS = ("sbatch", "sinfo", "squeue", "scancel", "scontrol", "srun")
MAX_MIN = 5
_NODES = {"a6000": ("a6000-0", "a6000-1"), "mi300x": ("mi300x-0",)}
_PROGRAM = """\
#!{python}
import sys
from pathlib import Path
from edif_hpc.testing.fake_slurm.programs import main
raise SystemExit(main({name!r}, Path({root!r}), sys.argv[1:]))
"""


@dataclass(frozen=True, kw_only=True)
class FakeSlurm:
    """A running fake."""

    root: Path

    @property
    def environ(self) -> dict[str, str]:
        """The environment in which its programs are found."""
        path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.root), "LANG": "C.UTF-8", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}  # fmt: skip

    @property
    def run(self) -> Runner:
        """Runs its programs."""
        return Runner(environ=self.environ)

    @property
    def ids(self) -> tuple[int, int]:
        """Whom jobs run as: ourselves."""
        return os.getuid(), os.getgid()

    @property
    def nodes(self) -> dict[str, tuple[str, ...]]:
        """The names of the nodes of each partition."""
        return dict(_NODES)

    def site(self) -> Site:
        """It, as a site file would describe it."""
        vendors: dict[str, Vendor] = {"a6000": "nvidia", "mi300x": "amd"}
        gpus = {
            kind: Gpu(
                partition=kind,
                gres=f"gpu:{kind}",
                vendor=vendor,
                max_walltime_min=MAX_MIN,
                cpus=1,
                mem_gb=1,
            )
            for kind, vendor in vendors.items()
        }
        return Site(name="fake", scheduler="slurm", state_dir=self.root / "state", gpus=gpus)

    def folder(self, name: str) -> Path:
        """A new folder."""
        path = self.root / name
        path.mkdir(mode=0o700)
        return path

    # -- what happens to it ------------------------------------------------------------------------------------------------

    def fault(
        self, program: str, kind: str, *, times: int | None = 1, seconds: float = 0.0
    ) -> None:
        """Let a program (`*`: each) have a fault, so many times; see `programs` for the kinds."""
        path = self.root / "faults.json"
        faults = json.loads(path.read_text())
        faults.append({"program": program, "kind": kind, "times": times, "seconds": seconds})
        path.write_text(json.dumps(faults))

    def heal(self) -> None:
        """No more faults."""
        (self.root / "faults.json").write_text("[]")

    def stop_controller(self) -> None:
        """Let nobody answer."""
        self.fault("*", "unreachable", times=None)

    def start_controller(self) -> None:
        """Have it answer again."""
        self.heal()

    def node_down(self, node: str) -> None:
        """Lose a node, with what runs on it."""
        with opened(self.root) as table:
            table.down.append(node)
            for job in table.jobs.values():
                if not table.runs and job.state == "RUNNING" and job.node == node:
                    job.state = "PENDING" if job.requeue else "NODE_FAIL"

    def node_up(self, node: str) -> None:
        """Have it back."""
        with opened(self.root) as table:
            table.down.remove(node)

    def end_now(self, job_id: str, in_s: int = 1) -> None:
        """Let a running job's time be over soon."""
        with opened(self.root) as table:
            table.jobs[int(job_id)].end_at = time.time() + in_s

    def hold(self, job_id: str, *, held: bool = True) -> None:
        """Keep a pending job from starting, or no more."""
        with opened(self.root) as table:
            table.jobs[int(job_id)].held = held

    def requeue_all(self) -> None:
        """Run every job again under its old id, whatever it was submitted with, as some administrators do."""
        with opened(self.root) as table:
            for job in table.jobs.values():
                job.requeue = True
        for node in [node for nodes in _NODES.values() for node in nodes]:
            self.node_down(node)
        wait_until(
            lambda: all(job.state != "RUNNING" for job in self.jobs()), 10, "all have ended"
        )
        for node in [node for nodes in _NODES.values() for node in nodes]:
            self.node_up(node)

    def forget(self, job_id: str) -> None:
        """Know a job no more, as Slurm does soon after its end."""
        with opened(self.root) as table:
            del table.jobs[int(job_id)]

    def finish(self, job_id: str, state: str = "COMPLETED") -> None:
        """End a job that is only a row of the table."""
        with opened(self.root) as table:
            table.jobs[int(job_id)].state = state

    def jobs(self) -> list[Job]:
        """All that it remembers."""
        with opened(self.root) as table:
            return list(table.jobs.values())


@contextmanager
def fake_slurm(root: Path, *, runs: bool = False) -> Iterator[FakeSlurm]:
    """A new fake below `root`; what it runs ends with it."""
    (root / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        path = root / "bin" / name
        path.write_text(_PROGRAM.format(python=sys.executable, name=name, root=str(root)))
        path.chmod(0o755)
    nodes = {kind: list(names) for kind, names in _NODES.items()}
    create(root, Table(partitions=nodes, max_min=MAX_MIN, runs=runs))
    try:
        yield FakeSlurm(root=root)
    finally:
        for left in processes_of(root):
            left.kill()
        shutil.rmtree(root, ignore_errors=True)
