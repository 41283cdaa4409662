"""A service that outlives its jobs, on a real Slurm: walltimes that end under load, and what else ends jobs.

The relay, the launcher, Slurm, pilots and workers are real processes; only the workers run no model. Every test ends with all its
requests answered rightly, and with no job that was submitted a second time for the same generation.
"""

from __future__ import annotations

import random
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.testing.bench import handover
from edif_hpc.testing.debian import PartMissing
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.raw_client import RawClient
from edif_hpc.testing.slurm import LICENSE, SlurmCluster, serve_slurm
from edif_hpc.testing.slurm_stack import SlurmStack
from edif_hpc.testing.wait import wait_until

pytestmark = pytest.mark.slow

#: A generation lasts for a minute or two, and Slurm looks at limits twice a minute.
NEXT_S = 240.0
SOON_S = 90.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    """A cluster of its own: each node has as many GPUs as all slots and their successors need."""
    with tempfile.TemporaryDirectory(prefix="edif-slurm-") as folder:
        Path(folder).chmod(0o755)
        try:
            with serve_slurm(Path(folder) / "root", gpus=8) as running:
                yield running
        except PartMissing as missing:
            absent(str(missing))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that the jobs' user can reach."""
    with tempfile.TemporaryDirectory(prefix="edif-site-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def site(cluster: SlurmCluster, public: Path) -> Iterator[SlurmStack]:
    """A relay with one deployment, over the cluster; no launcher yet."""
    with SlurmStack(root=public / "site", cluster=cluster) as running:
        running.stack.deploy()
        yield running


@pytest.fixture
def client(site: SlurmStack) -> RawClient:
    return site.stack.client()


class Sent:
    """Requests under way."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._blobs: dict[str, bytes] = {}

    def send(self, seconds: float, name: str = "") -> str:
        blob = Task(name=name or f"request {len(self._blobs)}", seconds=seconds).blob()
        request_id = self._client.send(blob)
        self._blobs[request_id] = blob
        return request_id

    def all_right(self) -> None:
        for request_id, blob in self._blobs.items():
            end = self._client.ended(request_id, NEXT_S)
            assert end.status == "COMPLETED", end
            assert self._client.result(end) == result_of(blob)


@pytest.fixture
def sent(client: RawClient) -> Sent:
    return Sent(client)


def generation(site: SlurmStack, number: int, **is_so: Callable[[Any], bool]) -> dict[str, Any]:
    """Wait until a generation of slot 0 is so."""

    def look() -> dict[str, Any] | None:
        found = [each for each in site.generations() if each["generation"] == number]
        return next((e for e in found if all(so(e[name]) for name, so in is_so.items())), None)

    what = f"generation {number} has its {', '.join(is_so)}"
    return wait_until(look, NEXT_S, what) or {}


def warm(site: SlurmStack, number: int) -> dict[str, Any]:
    return generation(site, number, warm_at=bool)


def runs(site: SlurmStack) -> bool:
    """Whether a request runs at this moment."""
    workers = site.stack.operator.workers("tiny")
    return any(each["worker"]["running"] for each in workers)


def no_second_jobs(site: SlurmStack) -> None:
    """Each allocation's folder has what one submission leaves there."""
    scripts = [each.parent.name for each in (site.root / "state").glob("*/*_submitted.pkl")]
    assert scripts
    assert {name: count for name, count in Counter(scripts).items() if count > 1} == {}


def test_walltimes_end_under_load(cluster: SlurmCluster, public: Path) -> None:
    """A short run of `scripts/bench handover`."""
    seed = random.SystemRandom().randrange(1 << 32)
    report = handover.run(
        public / "site",
        cluster,
        seed=seed,
        slots=5,
        hand_overs=3,
        walltime_min=1,
        longest_s=10.0,
        clients=20,
        pilots_submit=True,
    )
    assert report.ok, "\n".join(report.lines())
    assert len(report.hand_overs) >= 10, "\n".join(report.lines())


def test_a_job_that_somebody_cancels(site: SlurmStack, sent: Sent) -> None:
    site.start_launcher()
    site.up(slots=1, walltime_min=5)
    job_id = warm(site, 1)["job_id"]
    sent.send(seconds=15.0)
    wait_until(lambda: runs(site), SOON_S, "it runs")
    site.cluster.run(["scancel", job_id], timeout_s=20.0)
    warm(site, 2)
    assert generation(site, 1, ended_at=bool)["cause"]
    sent.all_right()
    no_second_jobs(site)


def test_a_node_that_goes_down(site: SlurmStack, sent: Sent) -> None:
    site.start_launcher()
    site.up(slots=1, walltime_min=5)
    node = warm(site, 1)["node"]
    assert node in site.cluster.nodes["a6000"]
    sent.send(seconds=20.0)
    wait_until(lambda: runs(site), SOON_S, "it runs")
    site.cluster.node_down(node)
    warm(site, 2)
    site.cluster.node_up(node)
    sent.all_right()
    no_second_jobs(site)


def test_a_controller_that_is_away_for_a_while(site: SlurmStack, sent: Sent) -> None:
    """What is not known is not gone: nothing is given up, and nothing submitted."""
    site.start_launcher()
    site.up(slots=1, walltime_min=1)
    warm(site, 1)
    sent.send(seconds=1.0)
    site.cluster.stop_controller()
    log = site.root / "launcher.log"
    wait_until(lambda: "could not be asked" in log.read_text(), SOON_S, "the launcher notices")
    sent.send(seconds=1.0)
    assert len([each for each in site.generations() if each["ended_at"] is None]) <= 2
    site.cluster.start_controller()
    warm(site, 2)
    sent.send(seconds=1.0)
    sent.all_right()
    no_second_jobs(site)


def test_a_relay_that_dies_during_a_hand_over(site: SlurmStack, sent: Sent) -> None:
    """Once while the successor is on its way, and once when both are there."""
    site.start_launcher()
    site.up(slots=1, walltime_min=1)
    warm(site, 1)
    sent.send(seconds=5.0)
    generation(site, 2, job_id=bool)
    site.stack.kill_relay()
    site.stack.start_relay()
    sent.send(seconds=5.0)
    warm(site, 2)
    site.stack.kill_relay()
    site.stack.start_relay()
    assert generation(site, 1, ended_at=bool)["cause"] == "drained"
    warm(site, 3)
    sent.send(seconds=1.0)
    sent.all_right()
    no_second_jobs(site)


def test_a_walltime_above_the_partitions_limit(site: SlurmStack, sent: Sent) -> None:
    """Slurm takes such a job, and never starts it. The slot says so, and goes on when it is asked for less."""
    facts = site.site
    limits = {"max_walltime_min": 60}
    gpus = {name: msgspec.structs.replace(gpu, **limits) for name, gpu in facts.gpus.items()}
    site.start_launcher(site=msgspec.structs.replace(facts, gpus=gpus))
    site.up(slots=1, walltime_min=30)
    generation(site, 1, reason=lambda reason: reason == "PartitionTimeLimit")
    told = wait_until(lambda: site.slot()["advice"] and site.slot(), SOON_S, "advice") or {}
    assert "shorter walltime" in told["advice"]
    assert "PartitionTimeLimit" in told["why"]
    sent.send(seconds=0.1)

    site.up(slots=1, walltime_min=2)
    warm(site, 2)
    assert generation(site, 1, ended_at=bool)["cause"] == "cancelled"
    sent.all_right()
    no_second_jobs(site)


def test_a_walltime_above_the_sites_limit(site: SlurmStack) -> None:
    """The launcher refuses it, and nothing is tried again until an operator has said something else."""
    site.start_launcher()
    site.up(slots=1, walltime_min=30)
    refused = generation(site, 1, ended_at=bool)
    assert "at most 5 min" in refused["detail"]
    why = wait_until(lambda: "paused" in site.slot()["why"] and site.slot()["why"], SOON_S, "why")
    assert "at most 5 min" in str(why)
    assert site.jobs() == {}
    site.up(slots=1, walltime_min=2)
    warm(site, 2)


def test_a_job_that_dies_before_any_of_our_code(site: SlurmStack) -> None:
    """Its log is all that knows why, and the launcher reads it."""
    site.start_launcher(site=msgspec.structs.replace(site.site, python="/nowhere/python"))
    site.up(slots=1, walltime_min=2)
    gone = generation(site, 1, ended_at=bool)
    assert gone["cause"] == "gone"
    assert "/nowhere/python" in gone["detail"]


def test_a_limit_of_one_running_job(site: SlurmStack, sent: Sent) -> None:
    """The successor cannot start beside the old one: that leaves when no usual request fits any more, and says so."""
    facts = site.site
    gpus = {
        name: msgspec.structs.replace(gpu, options={"licenses": f"{LICENSE}:1"})
        for name, gpu in facts.gpus.items()
    }
    site.start_launcher(site=msgspec.structs.replace(facts, gpus=gpus))
    site.up(slots=1, walltime_min=1)
    warm(site, 1)
    for _ in range(10):  # so many that how long a request takes is known
        sent.send(seconds=0.05)
    generation(site, 2, reason=lambda reason: "Licenses" in reason)
    told = wait_until(lambda: "cannot start beside it" in site.slot()["why"] and site.slot(), SOON_S, "told") or {}  # fmt: skip
    assert "a limit on running jobs" in told["advice"]
    sent.send(seconds=0.05)
    warm(site, 2)
    ended = generation(site, 1, ended_at=bool)
    assert ended["cause"] == "drained", ended
    sent.send(seconds=0.05)
    sent.all_right()
    no_second_jobs(site)


def test_a_cluster_without_room_for_two(site: SlurmStack, sent: Sent) -> None:
    """One node, and the service needs all of its GPUs: the old one leaves before its end, then the successor begins."""
    site.start_launcher()
    site.up(slots=1, walltime_min=1, gpu="mi300x", gpus=site.cluster.gpus)
    warm(site, 1)
    sent.send(seconds=1.0)
    generation(site, 2, reason=lambda reason: reason == "Resources")
    waits = "serves; generation 2 waits in the scheduler's queue"
    wait_until(lambda: site.slot()["why"].startswith(waits), SOON_S, "it is said so")
    warm(site, 2)
    assert generation(site, 1, ended_at=bool)["cause"] == "drained"
    sent.send(seconds=1.0)
    sent.all_right()
    no_second_jobs(site)


@pytest.mark.parametrize("point", ["launcher.submit.before", "launcher.submit.after"])
def test_a_launcher_that_dies_while_it_submits(site: SlurmStack, sent: Sent, point: str) -> None:
    """Whether there is a job or not, is found out; there is never a second one."""
    sent.send(seconds=0.1)
    site.up(slots=1, walltime_min=5)
    dying = site.start_launcher("login1", failpoints=f"{point}=kill")
    assert dying.wait(SOON_S) == -signal.SIGKILL
    assert len(site.jobs()) == (point == "launcher.submit.after")
    site.start_launcher("login2")
    warm(site, 1)
    sent.all_right()
    no_second_jobs(site)


def test_two_launchers_at_once(site: SlurmStack, sent: Sent) -> None:
    site.start_launcher("login1")
    site.start_launcher("login2")
    site.up(slots=4, walltime_min=1)
    for _ in range(8):
        sent.send(seconds=2.0)
    warm(site, 3)
    sent.all_right()
    no_second_jobs(site)
    names = Counter(site.jobs().values())
    assert all(count == 1 for count in names.values()), names
