"""What the fake does that a real Slurm seldom shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.errors import SlurmUnavailable, SubmitRefused, SubmitUnknown
from edif_hpc.slurm.status import Slurm
from edif_hpc.slurm.submit import SlurmSubmitter, Submission, submission_for
from edif_hpc.testing.fake_slurm.cluster import FakeSlurm, fake_slurm
from edif_hpc.testing.wait import wait_until
from edif_hpc.testing.witness import told

NAME = "edif-tiny-0-1-12345678"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSlurm]:
    with fake_slurm(tmp_path / "slurm") as fake:
        yield fake


def submission(fake: FakeSlurm, name: str = NAME) -> Submission:
    folder = fake.folder(name)
    (folder / "order").write_text(json.dumps({}))
    paths = {"order": folder / "order", "folder": folder, "module": "edif_hpc.testing.witness"}
    return submission_for(fake.site(), gpu="a6000", gpus=1, walltime_min=2, name=name, **paths)


def submit(fake: FakeSlurm, *, timeout_s: float = 30.0) -> str:
    return SlurmSubmitter(fake.site(), run=fake.run, timeout_s=timeout_s).submit(submission(fake))


def slurm(fake: FakeSlurm) -> Slurm:
    return Slurm(fake.site(), run=fake.run, timeout_s=2.0)


@pytest.mark.parametrize(("kind", "there"), [("hang", False), ("hang_after", True)])
def test_an_sbatch_that_never_answers(fake: FakeSlurm, kind: str, there: bool) -> None:
    fake.fault("sbatch", kind)
    with pytest.raises(SubmitUnknown, match="did not answer"):
        submit(fake, timeout_s=4.0)
    assert (slurm(fake).find(NAME) is not None) == there


@pytest.mark.parametrize(
    ("kind", "there"), [("socket_timed_out", False), ("socket_timed_out_after", True)]
)
def test_an_sbatch_whose_answer_is_lost(fake: FakeSlurm, kind: str, there: bool) -> None:
    fake.fault("sbatch", kind)
    with pytest.raises(SubmitUnknown, match="Socket timed out"):
        submit(fake)
    assert (slurm(fake).find(NAME) is not None) == there


def test_no_controller(fake: FakeSlurm) -> None:
    fake.fault("sbatch", "unreachable")
    with pytest.raises(SubmitRefused) as refused:
        submit(fake)
    assert refused.value.kind == "retry"


@pytest.mark.parametrize("kind", ["empty", "socket_timed_out", "unreachable", "hang"])
def test_a_squeue_that_tells_nothing_once(fake: FakeSlurm, kind: str) -> None:
    job_id = submit(fake)
    fake.fault("squeue", kind)
    with pytest.raises(SlurmUnavailable):
        slurm(fake).list_jobs()
    assert [each.job_id for each in slurm(fake).list_jobs()] == [job_id]


def test_held_and_late(fake: FakeSlurm) -> None:
    fake.fault("sbatch", "hold")
    job_id = submit(fake)
    line = slurm(fake).find(NAME)
    assert line is not None
    assert (line.state, line.reason) == ("pending", "JobHeldUser")
    fake.hold(job_id, held=False)
    line = slurm(fake).find(NAME)
    assert line is not None
    assert line.state == "running"

    fake.fault("sbatch", "late", seconds=100)
    other = submission(fake, "edif-tiny-1-1-12345678")
    SlurmSubmitter(fake.site(), run=fake.run).submit(other)
    line = slurm(fake).find(other.name)
    assert line is not None
    assert line.start_in_s is not None
    assert 50 < line.start_in_s <= 100


def test_rows_end_by_their_time_or_by_hand(fake: FakeSlurm) -> None:
    job_id = submit(fake)
    fake.end_now(job_id, 0)
    assert slurm(fake).find(NAME) is None
    assert [job.state for job in fake.jobs()] == ["TIMEOUT"]
    fake.forget(job_id)
    assert slurm(fake).left_s(job_id) is None


def test_the_same_id_runs_again_where_a_site_requeues(tmp_path: Path) -> None:
    with fake_slurm(tmp_path / "slurm", runs=True) as fake:
        submit(fake)
        folder = fake.root / NAME
        wait_until(lambda: told(folder), 20, "it runs")
        fake.requeue_all()
        wait_until(lambda: len(told(folder)) == 2, 20, "it runs again")
        first, second = (each["environ"] for each in told(folder))
        assert first["SLURM_JOB_ID"] == second["SLURM_JOB_ID"]
        assert "SLURM_RESTART_COUNT" not in first
        assert second["SLURM_RESTART_COUNT"] == "1"
