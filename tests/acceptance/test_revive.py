"""Nobody on the login node: pilots submit their successors themselves, on a real Slurm, and leave before it ends them."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edif_hpc.slurm.site import Site
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.slurm import SlurmCluster
from edif_hpc.testing.slurm_stack import SlurmStack
from edif_hpc.testing.wait import wait_until

CHANGE_S = 150.0


@pytest.fixture(scope="module")
def login(slurm_cluster: SlurmCluster) -> Iterator[SlurmStack]:
    """A relay, a real Slurm, and no launcher yet."""
    with tempfile.TemporaryDirectory(prefix="edif-site-") as folder:
        Path(folder).chmod(0o755)  # the jobs' user has to reach it
        with SlurmStack(
            root=Path(folder) / "site",
            cluster=slurm_cluster,
            pilots_submit=True,
            settings={"lead_margin_s": 90.0},  # so that generations change soon after they begin
        ) as stack:
            stack.stack.deploy(executors=4)
            yield stack


def begin(login: SlurmStack, *, walltime_min: int, site: Site | None = None) -> None:
    """One generation by a launcher, which is gone then."""
    launcher = login.start_launcher(site=site)
    login.up(slots=1, walltime_min=walltime_min)
    login.wait_warm()
    login.launchers.remove(launcher)
    login.end_launcher(launcher, signal.SIGKILL)


def ended(login: SlurmStack) -> list[dict[str, Any]]:
    """The generations that are over."""
    return [each for each in login.generations() if each["state"] == "ended"]


def record(login: SlurmStack, name: str) -> dict[str, Any]:
    """What a pilot wrote down."""
    found: dict[str, Any] = json.loads((login.root / "state" / name / "exit.json").read_text())
    return found


def test_generations_follow_each_other_without_a_launcher(login: SlurmStack) -> None:
    begin(login, walltime_min=2)
    client = login.stack.client("ada")
    sent: dict[str, bytes] = {}

    def two_changes() -> bool:
        blob = Task(name=f"r{len(sent)}", seconds=0.2).blob()
        request_id = client.send(blob)
        sent[request_id] = blob
        assert client.result(client.ended(request_id)) == result_of(blob)
        return len(ended(login)) >= 2

    wait_until(two_changes, 2 * CHANGE_S, "two generations were replaced")
    made = login.generations()
    assert [each["generation"] for each in made] == list(range(1, len(made) + 1))
    assert {each["cause"] for each in made if each["state"] == "ended"} == {"drained"}
    first = record(login, made[0]["name"])
    assert (first["cause"], first["job_id"], first["node"]) == (
        "drained",
        made[0]["job_id"],
        made[0]["node"],
    )
    assert first["requests"] >= 1
    assert first["left_s"] > 0, "it left before Slurm would have ended it"
    names = [each["name"] for each in made]
    assert len(set(login.jobs().values()) - set(names)) == 0, "no job that nobody knows"
    kept = list((login.root / "state" / "scratch").glob("*/*/pilot.lock"))
    assert len(kept) <= 2, "a node's folder goes with its pilot"


def test_a_pilot_that_may_not_submit_leaves_it_to_the_launcher(login: SlurmStack) -> None:
    login.stack.operator.post("/drain", {"deployment": "tiny"})
    wait_until(lambda: not login.jobs(), CHANGE_S, "all jobs have ended")
    begin(
        login, walltime_min=2, site=msgspec.structs.replace(login.site, compute_may_submit=False)
    )
    wait_until(lambda: login.generations()[-1]["state"] == "ordered", CHANGE_S, "it is ordered")
    order = login.generations()[-1]
    client = login.stack.client("bob")
    blob = Task(name="meanwhile").blob()
    assert client.result(client.ended(client.send(blob))) == result_of(blob)
    assert login.generations()[-1]["state"] == "ordered", "nobody has taken it"
    login.start_launcher()
    wait_until(
        lambda: login.generations()[-1]["state"] == "warm", CHANGE_S, "the successor serves"
    )
    assert login.generations()[-1]["name"] == order["name"]
