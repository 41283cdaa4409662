"""A site whose compute node reaches only the login node, and a relay outside."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edif_hpc.cli.api import Api
from edif_hpc.launcher.runtime import Launcher
from edif_hpc.settings import ClientSettings
from edif_hpc.slurm.order import RouteKind, read_pilot_order, write_order
from edif_hpc.slurm.site import Site, load_site
from edif_hpc.slurm.status import JobLine
from edif_hpc.slurm.submit import Submission
from edif_hpc.testing.absent import absent
from edif_hpc.testing.debian import PartMissing
from edif_hpc.testing.node import Node, outside_address, serve_node
from edif_hpc.testing.stack import Stack, child_environ
from edif_hpc.testing.wait import wait_until

WAIT_S = 30.0
NOOP = "edif_hpc.testing.noop_worker"
SITE = """
name = "hpc"
scheduler = "slurm"
state_dir = "{state_dir}"
scratch = "{scratch}"
route = "{route}"
proxy = "{proxy}"
compute_may_submit = false

[gpus.a]
partition = "a"
gres = "gpu:a"
vendor = "none"
max_walltime_min = 600
cpus = 1
mem_gb = 1
"""


@dataclass
class Jobs:
    """The scheduler of one node: a job is a pilot that runs there."""

    node: Node
    join_s: float = 120.0
    running: dict[str, tuple[str, subprocess.Popen[bytes]]] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def submit(self, submission: Submission) -> str:
        order = read_pilot_order(submission.order)
        write_order(submission.order, msgspec.structs.replace(order, join_s=self.join_s))
        command = [sys.executable, "-u", "-m", "edif_hpc.pilot.app", str(submission.order)]
        job_id = str(next(self.numbers))
        with (submission.folder / "pilot.log").open("ab") as log:
            process = subprocess.Popen(
                self.node.command(command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=child_environ(),
                start_new_session=True,
            )
        self.running[job_id] = (submission.name, process)
        return job_id

    def list_jobs(self) -> list[JobLine]:
        return [
            JobLine(
                name=name,
                job_id=job_id,
                state="running" if process.poll() is None else "completed",
                reason="",
                node="n1",
            )
            for job_id, (name, process) in self.running.items()
        ]

    def reap(self) -> None:
        """Wait for the end of all."""
        for _, process in self.running.values():
            process.wait(WAIT_S)

    def cancel(self, job_id: str, *, name: str) -> None:
        mine, process = self.running[job_id]
        assert mine == name
        process.terminate()


@dataclass
class Cluster:
    """The site, its launcher and the relay that it serves."""

    stack: Stack
    node: Node
    jobs: Jobs
    ends: ExitStack
    launcher: Launcher | None = None

    @property
    def site_file(self) -> Path:
        return self.stack.root / "hpc.toml"

    @property
    def site(self) -> Site:
        return load_site(self.site_file)

    @property
    def log(self) -> str:
        """What all pilots said."""
        logs = sorted(self.site.state_dir.glob("*/pilot.log"))
        return "\n".join(each.read_text() for each in logs)

    def describe(self, route: RouteKind, proxy: str = "") -> None:
        """Write the site's file."""
        root = self.stack.root
        facts = {"state_dir": root / "state", "scratch": root / "scratch"}
        text = SITE.format(route=route, proxy=proxy, **facts)
        self.site_file.write_text(text)

    @cached_property
    def environ(self) -> dict[str, str]:
        """Of a launcher."""
        token = self.stack.token("launcher", role="launcher")
        return child_environ() | {"EDIF_RELAY": self.stack.url, "EDIF_TOKEN": token}

    def up(self) -> None:
        """Have an allocation submitted."""
        api = Api(ClientSettings(relay=self.stack.url, token=self.environ["EDIF_TOKEN"]))
        self.ends.callback(api._http.close)
        self.launcher = Launcher(
            site=self.site,
            name="login1",
            relay=api,
            scheduler=self.jobs,
            submitter=self.jobs,
            worker_module=NOOP,
        )
        asked = {"deployment": "tiny", "site": "hpc", "walltime_min": 600}
        self.stack.operator.post("/allocations", asked)
        wait_until(lambda: self.round().submitted, WAIT_S, "the launcher has submitted it")

    def drain(self) -> None:
        """End all allocations in order."""
        self.stack.operator.post("/drain", {})
        self.jobs.reap()

    def round(self) -> Any:
        assert self.launcher is not None
        return self.launcher.round()


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A cluster without a way out yet."""
    with ExitStack() as stack:
        try:
            node = stack.enter_context(serve_node())
            address = stack.enter_context(outside_address())
        except PartMissing as missing:
            absent(str(missing))
        settings = {"behind_proxy": True}
        relay = Stack(root=tmp_path / "stack", host=address, settings=settings)
        jobs = Jobs(node)
        stack.callback(jobs.reap)
        running = stack.enter_context(relay)  # its end ends all jobs
        running.deploy()
        yield Cluster(stack=running, node=node, jobs=jobs, ends=stack)
