"""All of it at once: the command line's launcher, a real Slurm, real containers, a real model, and the unmodified nnsight client.

One service, two generations: the second takes over before the first one's walltime ends, while a researcher goes on working.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.slurm.order import EngineFacts
from edif_hpc.slurm.site import Container
from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.slurm import SlurmCluster
from edif_hpc.testing.slurm_stack import SlurmStack
from edif_hpc.testing.stack import MODEL
from edif_hpc.testing.wait import wait_until

pytestmark = pytest.mark.slow

NEXT_S = 300.0
PROLOGUE = f"""
import torch
from nnsight import LanguageModel
model, here = LanguageModel({MODEL!r}), LanguageModel({MODEL!r}, dispatch=True)
"""
TRACE = """
with model.trace("A service outlives its jobs", remote=True):
    remote = model.lm_head.output.save()
with here.trace("A service outlives its jobs"):
    local = here.lm_head.output.save()
report(equal=torch.equal(remote, local), shape=list(remote.shape))
"""


@pytest.fixture
def site(
    slurm_cluster: SlurmCluster, apptainer: Path, worker_image: Path, tiny_gpt2: Path
) -> Iterator[SlurmStack]:
    """A relay over a Slurm whose workers run in containers."""
    with worker_image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    before = os.umask(0o022)  # what is made for the jobs' user has to be readable
    with tempfile.TemporaryDirectory(prefix="edif-site-") as folder:
        Path(folder).chmod(0o755)
        with SlurmStack(
            root=Path(folder) / "site",
            cluster=slurm_cluster,
            models={MODEL: tiny_gpt2},
            engine=EngineFacts(threads=1, ready=1),
            container=Container(image=str(worker_image), sha256=digest, apptainer=str(apptainer)),
            pilots_submit=True,
        ) as running:
            running.stack.engine = EngineFacts(threads=1)
            yield running
    os.umask(before)


def generation(site: SlurmStack, number: int, fact: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        found = [each for each in site.generations() if each["generation"] == number]
        return next((each for each in found if each[fact]), None)

    return wait_until(look, NEXT_S, f"generation {number} has its {fact}") or {}


def test_a_researcher_works_on_while_jobs_come_and_go(site: SlurmStack, tmp_path: Path) -> None:
    stack = site.stack
    stack.deploy()
    site.start_launcher(noop=False)
    site.up(slots=1, walltime_min=2)
    generation(site, 1, "warm_at")
    (line,) = stack.operator.workers("tiny")
    assert line["worker"]["isolation"] == "full"
    with ClientProcess(stack.client_environ(stack.token("ada")), tmp_path / "ada") as client:
        client.run(PROLOGUE)
        told = client.run(TRACE)
        assert told["equal"], "a remote result is that of a local run"

        def worked_until_the_second_is_warm() -> bool:
            assert client.run(TRACE) == told
            return any(e["generation"] == 2 and e["warm_at"] for e in site.generations())

        wait_until(worked_until_the_second_is_warm, NEXT_S, "generation 2 is warm")
        assert client.run(TRACE) == told
        first = generation(site, 1, "ended_at")
        assert first["cause"] == "drained", first
        assert client.run(TRACE) == told
    requests = stack.operator.get("/requests")["requests"]
    assert requests
    assert {each["state"] for each in requests} == {"COMPLETED"}
    assert [each["generation"] for each in site.generations()][:2] == [1, 2]
