"""What the rest of edif-hpc takes for granted about Slurm, asked of a real one and of the fake alike."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.errors import LaunchError, SlurmUnavailable, SubmitRefused, SubmitUnknown
from edif_hpc.slurm.commands import Runner
from edif_hpc.slurm.status import JobLine, Slurm
from edif_hpc.slurm.submit import SlurmSubmitter, Submission, submission_for
from edif_hpc.testing.fake_slurm.cluster import MAX_MIN, FakeSlurm, fake_slurm
from edif_hpc.testing.slurm import SlurmCluster
from edif_hpc.testing.wait import wait_until
from edif_hpc.testing.witness import told

SOON_S = 20.0
#: Slurm looks at time limits every half minute.
LIMIT_S = 45.0
Cluster = SlurmCluster | FakeSlurm


@pytest.fixture(params=["fake", "real"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    if request.param == "real":
        yield request.getfixturevalue("slurm_cluster")
        return
    with fake_slurm(tmp_path / "slurm", runs=True) as fake:
        yield fake


@pytest.fixture
def desk(cluster: Cluster) -> Iterator[Desk]:
    desk = Desk(cluster=cluster)
    yield desk
    for each in desk.sent:
        desk.slurm.cancel(each.job_id, name=each.name)


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A submission that has a job."""

    name: str
    job_id: str
    folder: Path

    def events(self) -> list[str]:
        return [each["event"] for each in told(self.folder)]

    def environ(self) -> dict[str, str]:
        seen: dict[str, str] = told(self.folder)[0]["environ"]
        return seen

    def wait_for(self, event: str, timeout_s: float = SOON_S) -> None:
        wait_until(
            lambda: event in self.events(), timeout_s, f"{self.name} tells {event}: {self.log()}"
        )

    def log(self) -> str:
        return "\n".join(each.read_text() for each in self.folder.glob("*_log.out"))


class Desk:
    """Where a test submits and asks."""

    def __init__(self, *, cluster: Cluster) -> None:
        self.cluster = cluster
        self.slurm = Slurm(cluster.site(), run=cluster.run)
        self.sent: list[Sent] = []

    def submission(self, order: dict[str, Any] | None = None, **facts: Any) -> Submission:
        name = f"edif-tiny-0-1-{secrets.token_hex(4)}"
        folder = self.cluster.folder(name)
        path = folder / "order"
        path.write_text(json.dumps(order or {}))
        os.chown(path, *self.cluster.ids)
        path.chmod(0o600)
        asked: dict[str, Any] = {
            "gpu": "a6000",
            "gpus": 1,
            "walltime_min": 2,
            "signal_lead_s": 10,
        } | facts
        module = "edif_hpc.testing.witness"
        return submission_for(
            self.cluster.site(), name=name, order=path, folder=folder, module=module, **asked
        )

    def submitter(self, **facts: Any) -> SlurmSubmitter:
        return SlurmSubmitter(self.cluster.site(), **{"run": self.cluster.run, **facts})

    def submit(self, submission: Submission) -> Sent:
        return self.keep(submission, self.submitter().submit(submission))

    def keep(self, submission: Submission, job_id: str) -> Sent:
        self.sent.append(Sent(name=submission.name, job_id=job_id, folder=submission.folder))
        return self.sent[-1]

    def line(self, sent: Sent) -> JobLine | None:
        return self.slurm.find(sent.name)

    def wait_line(self, sent: Sent, *states: str) -> JobLine:
        def seen() -> JobLine | None:
            line = self.line(sent)
            return line if line is not None and line.state in states else None

        line = wait_until(seen, SOON_S, f"{sent.name} is {' or '.join(states)}")
        assert line is not None
        return line

    def wait_gone(self, sent: Sent, timeout_s: float = SOON_S) -> None:
        wait_until(lambda: self.line(sent) is None, timeout_s, f"{sent.name} is gone")


def test_a_job_is_listed_until_it_is_cancelled(desk: Desk) -> None:
    sent = desk.submit(desk.submission())
    assert sent.job_id in {each.job_id for each in desk.slurm.list_jobs()}
    line = desk.wait_line(sent, "running")
    assert line.job_id == sent.job_id
    assert line.node in desk.cluster.nodes["a6000"]
    assert line.left_s is not None
    assert 60 < line.left_s <= 120
    left_s = desk.slurm.left_s(sent.job_id)
    assert left_s == pytest.approx(line.left_s, abs=5)
    sent.wait_for("started")

    desk.slurm.cancel(sent.job_id, name="edif-another-0-1-12345678")
    line = desk.wait_line(sent, "running", "completing")
    assert line.state == "running", "a job of another name is nobody's to cancel"
    desk.slurm.cancel(sent.job_id, name=sent.name)
    sent.wait_for("SIGTERM")
    desk.wait_gone(sent)
    desk.slurm.cancel(sent.job_id, name=sent.name)


def test_what_slurm_never_heard_of_is_gone(desk: Desk) -> None:
    assert desk.slurm.find("edif-tiny-0-9-12345678") is None
    assert desk.slurm.left_s("999999") is None
    desk.slurm.cancel("999999", name="edif-tiny-0-9-12345678")


@pytest.mark.parametrize(
    ("gpu", "variable"), [("a6000", "CUDA_VISIBLE_DEVICES"), ("mi300x", "ROCR_VISIBLE_DEVICES")]
)
def test_a_job_knows_itself_and_its_gpus_and_nothing_of_us(
    desk: Desk, gpu: str, variable: str
) -> None:
    run = desk.cluster.run
    secret = {
        "EDIF_TOKEN": "edif_secret",
        "SLURM_JOB_ID": "7",
        "SBATCH_PARTITION": "nope",
        "SUBMITIT_X": "y",
    }
    leaky = Runner(prefix=run.prefix, environ={**(run.environ or {}), **secret})
    submission = desk.submission(gpu=gpu, gpus=2)
    sent = desk.keep(submission, desk.submitter(run=leaky).submit(submission))
    sent.wait_for("started")
    environ = sent.environ()
    assert environ["SLURM_JOB_ID"] == sent.job_id
    assert environ["SLURM_JOB_NAME"] == sent.name
    assert environ["SLURM_JOB_PARTITION"] == gpu
    assert environ[variable] == "0,1"
    assert environ["PATH"] == leaky.environ["PATH"]  # type: ignore[index]
    assert "EDIF_TOKEN" not in environ
    assert "edif_secret" not in "".join(
        each.read_text() for each in sent.folder.glob(".submission*")
    )


def test_an_allocation_may_end_by_itself(desk: Desk) -> None:
    sent = desk.submit(desk.submission({"exit_code": 0}))
    desk.wait_gone(sent)
    assert sent.events() == ["started"]
    failed = desk.submit(desk.submission({"exit_code": 3}))
    desk.wait_gone(failed)
    assert failed.events() == ["started"]
    assert not list(failed.folder.glob("*result.pkl")), "the exit code is all that submitit hears"


def test_why_a_job_waits(desk: Desk) -> None:
    later = desk.submit(desk.submission(begin_after_s=90.2))
    waiting = desk.wait_line(later, "pending")
    assert (waiting.node, waiting.left_s) == (None, None)
    seen = wait_until(
        lambda: _with_reason(desk, later, "BeginTime"), SOON_S, "it waits for its time"
    )
    assert seen is not None
    assert seen.start_in_s is None or 60 < seen.start_in_s < 100
    too_long = desk.submit(replace(desk.submission(), walltime_min=MAX_MIN + 1))
    wait_until(lambda: _with_reason(desk, too_long, "PartitionTimeLimit"), SOON_S, "it never runs")
    after = desk.submit(desk.submission(dependency=f"after:{later.job_id}+1"))
    wait_until(lambda: _with_reason(desk, after, "Dependency"), SOON_S, "it waits for another")
    desk.cluster.hold(later.job_id)
    wait_until(lambda: _with_reason(desk, later, "JobHeld"), SOON_S, "it is held")


def _with_reason(desk: Desk, sent: Sent, reason: str) -> JobLine | None:
    line = desk.line(sent)
    return line if line is not None and line.reason.startswith(reason) else None


def test_refusals_say_what_helps(desk: Desk) -> None:
    plain = desk.submission()
    for wrong in (
        replace(plain, gres="gpu:mi300x:1"),
        replace(plain, gres="gpu:a6000:9"),
        replace(plain, partition="nowhere"),
        replace(plain, exclude=("no-such-node",)),
        replace(plain, extra={"no-such-option": "1"}),
        replace(plain, walltime_min=None),
    ):
        with pytest.raises(SubmitRefused) as refused:
            desk.submitter().submit(wrong)
        assert refused.value.kind == "config", str(refused.value)
    assert desk.slurm.find(plain.name) is None
    with pytest.raises(SubmitRefused, match="at most 5 min"):
        desk.submission(walltime_min=MAX_MIN + 1)


def test_a_folder_that_others_may_write_is_refused(desk: Desk) -> None:
    submission = desk.submission()
    submission.folder.chmod(0o770)
    with pytest.raises(SubmitRefused, match="others may write"):
        desk.submitter().submit(submission)


def test_a_dry_run_submits_nothing(desk: Desk) -> None:
    submission = desk.submission()
    assert "to start at" in desk.submitter().test_only(submission)
    with pytest.raises(SubmitRefused, match="partition"):
        desk.submitter().test_only(replace(submission, partition="nowhere"))
    assert desk.slurm.find(submission.name) is None


def test_excluded_nodes_are_left_alone(desk: Desk) -> None:
    first, second = desk.cluster.nodes["a6000"]
    for bad, good in ((first, second), (second, first)):
        line = desk.wait_line(desk.submit(desk.submission(exclude=(bad,))), "running")
        assert line.node == good


def test_a_lost_answer_leaves_a_job_that_is_found_and_runs(desk: Desk) -> None:
    folder = desk.cluster.folder("bin-" + secrets.token_hex(4))
    program = folder / "sbatch"
    environ = desk.cluster.environ
    real = shutil.which("sbatch", path=environ["PATH"])
    program.write_text(f'#!/bin/sh\n{real} "$@" >"$0.said" 2>&1\nexec sleep 60\n')
    program.chmod(0o755)
    folder.chmod(folder.stat().st_mode | stat.S_IROTH | stat.S_IXOTH)
    mute = Runner(
        prefix=desk.cluster.run.prefix, environ=environ | {"PATH": f"{folder}:{environ['PATH']}"}
    )
    submission = desk.submission()
    (folder / "sbatch.said").touch()
    os.chown(folder / "sbatch.said", *desk.cluster.ids)

    with pytest.raises(SubmitUnknown, match="did not answer"):
        desk.submitter(run=mute, timeout_s=5).submit(submission)
    assert "Submitted batch job" in (folder / "sbatch.said").read_text()
    line = desk.slurm.find(submission.name)
    assert line is not None
    desk.keep(submission, line.job_id).wait_for("started")


def test_silence_is_not_the_end_of_jobs(desk: Desk) -> None:
    sent = desk.submit(desk.submission())
    sent.wait_for("started")
    slurm = Slurm(desk.cluster.site(), run=desk.cluster.run, timeout_s=1.0)
    desk.cluster.stop_controller()
    try:
        with pytest.raises(SlurmUnavailable):
            slurm.list_jobs()
        with pytest.raises(SlurmUnavailable):
            slurm.cancel(sent.job_id, name=sent.name)
        with pytest.raises(SlurmUnavailable):
            slurm.left_s(sent.job_id)
        with pytest.raises(LaunchError) as error:
            desk.submitter(timeout_s=3).submit(desk.submission())
        assert (
            isinstance(error.value, SubmitUnknown) or getattr(error.value, "kind", "") == "retry"
        )
    finally:
        desk.cluster.start_controller()
    assert desk.wait_line(sent, "running").job_id == sent.job_id


def test_a_lost_node_ends_a_job_for_good(desk: Desk) -> None:
    sent = desk.submit(desk.submission())
    sent.wait_for("started")
    node = desk.wait_line(sent, "running").node
    assert node is not None
    desk.cluster.node_down(node)
    try:
        desk.wait_gone(sent)
    finally:
        desk.cluster.node_up(node)
    assert sent.events().count("started") == 1
    assert desk.line(sent) is None


def test_the_end_of_the_walltime_is_announced_and_comes(desk: Desk) -> None:
    warned = desk.submit(desk.submission({"stays": True}, walltime_min=5, signal_lead_s=290))
    ended = desk.submit(desk.submission({"stays": True}, walltime_min=5))
    for each in (warned, ended):
        each.wait_for("started")
    desk.cluster.end_now(warned.job_id, 100)
    desk.cluster.end_now(ended.job_id)
    ended.wait_for("SIGTERM", LIMIT_S)
    desk.wait_gone(ended)
    assert desk.slurm.left_s(ended.job_id) in {0.0, None}
    warned.wait_for("SIGUSR2", LIMIT_S)
    assert desk.line(warned) is not None, (
        "submitit's own handler would have put it back into the queue"
    )
    assert warned.events() == ["started", "SIGUSR2"]
