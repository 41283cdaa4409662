"""A round of the launcher: what it tells the relay, what it does, and what it leaves alone."""

from __future__ import annotations

import errno
import fcntl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.errors import (
    InvalidInput,
    LaunchError,
    NotAuthenticated,
    SlurmUnavailable,
    SubmitRefused,
    SubmitUnknown,
    Unavailable,
)
from edif_hpc.launcher.daemon import serve
from edif_hpc.launcher.runtime import Launcher, only_one
from edif_hpc.slurm.order import read_pilot_order
from edif_hpc.slurm.ordering import folder_of
from edif_hpc.slurm.site import Container, Gpu, Site
from edif_hpc.slurm.status import JobLine
from edif_hpc.testing.submitter import FakeSubmitter

NAME = "edif-gpt2-0-3-abcdef01"
ORDER = {
    "kind": "submit", "allocation": "abcdef0123456789", "name": NAME, "join_token": "secret", "deployment": "gpt2",
    "slot": 0, "generation": 3, "gpu": "a6000", "gpus": 1, "walltime_min": 60, "exclude": ["bad1"], "begin_after_s": 5.0,
}  # fmt: skip
CANCEL = {
    "kind": "cancel", "allocation": "abcdef0123456789", "name": NAME, "job_id": None, "reason": "drained",
}  # fmt: skip


@dataclass
class FakeRelay:
    orders: list[dict[str, Any]] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    url: str = "https://relay.example.edu"
    failing: list[Exception] = field(default_factory=list)

    limits: list[int] = field(default_factory=list)  #: how many orders were asked for each time

    def post(self, path: str, body: dict[str, Any]) -> Any:
        if self.failing:
            raise self.failing.pop(0)
        if path.endswith("/orders"):
            self.limits.append(body["limit"])
            return {"orders": self.orders}
        self.reports.append(body)
        return {}


@dataclass
class FakeScheduler:
    jobs: list[JobLine] | None = field(default_factory=list)
    ended: list[tuple[str, str]] = field(default_factory=list)

    def list_jobs(self) -> list[JobLine]:
        if self.jobs is None:
            raise SlurmUnavailable("squeue: Socket timed out")
        return self.jobs

    def cancel(self, job_id: str, *, name: str) -> None:
        self.ended.append((job_id, name))


@dataclass
class Bench:
    launcher: Launcher
    relay: FakeRelay
    scheduler: FakeScheduler
    submitter: FakeSubmitter


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    gpu = Gpu(
        partition="a6000",
        gres="gpu:a6000",
        vendor="nvidia",
        max_walltime_min=120,
        cpus=4,
        mem_gb=16,
    )
    image = Container(image="/images/worker.sif", sha256="0" * 64)
    site = Site(
        name="alpha",
        scheduler="slurm",
        state_dir=tmp_path / "state",
        scratch="/scratch",
        gpus={"a6000": gpu},
        container=image,
    )
    relay, scheduler, submitter = FakeRelay(), FakeScheduler(), FakeSubmitter(lambda: "17")
    launcher = Launcher(
        site=site, name="login1", relay=relay, scheduler=scheduler, submitter=submitter
    )
    return Bench(launcher, relay, scheduler, submitter)


def raising(error: Exception) -> Callable[[], str]:
    def outcome() -> str:
        raise error

    return outcome


def test_an_order_becomes_a_job_and_the_relay_hears_its_id(bench: Bench) -> None:
    bench.relay.orders = [ORDER]
    bench.scheduler.jobs = [JobLine(name="edif-other-0-1-00000000", job_id="3", state="running")]
    done = bench.launcher.round()
    assert done.submitted == [(NAME, "17")]
    (submission,) = bench.submitter.taken
    assert (submission.name, submission.partition, submission.gres) == (
        NAME,
        "a6000",
        "gpu:a6000:1",
    )
    assert (submission.exclude, submission.begin_after_s, submission.walltime_min) == (
        ("bad1",),
        5.0,
        60,
    )
    listed, reported = bench.relay.reports
    assert [each["job_id"] for each in listed["jobs"]] == ["3"]
    assert reported["submitted"] == [{"allocation": ORDER["allocation"], "job_id": "17"}]
    assert reported["jobs"] is None


@pytest.mark.parametrize(
    "said", ["Invalid node name specified", "Requested node configuration is not available"]
)
def test_a_node_without_which_there_is_no_job_is_not_left_out(bench: Bench, said: str) -> None:
    """It has left the cluster, or it is the last one."""
    bench.relay.orders = [ORDER]
    outcomes = iter([SubmitRefused(f"sbatch: error: {said}", kind="config")])

    def outcome() -> str:
        for error in outcomes:
            raise error
        return "17"

    bench.submitter.outcome = outcome
    assert bench.launcher.round().submitted == [(NAME, "17")]
    assert [each.exclude for each in bench.submitter.taken] == [("bad1",), ()]


def test_the_order_of_the_pilot_is_for_its_owner_alone(bench: Bench) -> None:
    bench.relay.orders = [ORDER]
    bench.launcher.round()
    (file,) = folder_of(bench.launcher.site, NAME).glob("pilot-*.order")
    assert file.stat().st_mode & 0o777 == 0o600
    order = read_pilot_order(file)
    assert (order.join_token, order.relay_url) == ("secret", bench.relay.url)
    assert order.container is not None
    assert (order.container.image, order.container.vendor) == ("/images/worker.sif", "nvidia")


def test_a_launcher_that_wakes_up_late_leaves_the_newer_order_alone(bench: Bench) -> None:
    """Two jobs of one allocation: each reads the order that it was submitted with."""
    for token in ("newer", "older"):
        bench.relay.orders = [ORDER | {"join_token": token}]
        bench.launcher.round()
    found = [read_pilot_order(each.order).join_token for each in bench.submitter.taken]
    assert found == ["newer", "older"]


def test_a_scheduler_that_does_not_answer_is_unknown_never_empty(bench: Bench) -> None:
    bench.scheduler.jobs = None
    done = bench.launcher.round()
    assert bench.relay.reports[0]["jobs"] is None
    assert "timed out" in bench.relay.reports[0]["detail"]
    assert done.lines() == ["the scheduler could not be asked"]


def test_a_refusal_is_told_with_its_kind(bench: Bench) -> None:
    bench.relay.orders = [ORDER]
    bench.submitter.outcome = raising(SubmitRefused("over quota", kind="quota"))
    bench.launcher.round()
    assert bench.relay.reports[-1]["refused"] == [
        {"allocation": ORDER["allocation"], "kind": "quota", "detail": "over quota"}
    ]


def test_an_unknown_outcome_is_neither_submitted_nor_refused(bench: Bench) -> None:
    bench.relay.orders = [ORDER]
    bench.submitter.outcome = raising(SubmitUnknown("sbatch timed out"))
    done = bench.launcher.round()
    assert done.doubtful == [NAME]
    assert not any("submitted" in each or "refused" in each for each in bench.relay.reports)


def test_what_the_site_cannot_give_is_refused_before_anything_is_submitted(bench: Bench) -> None:
    bench.relay.orders = [ORDER | {"gpu": "h200"}]
    bench.launcher.round()
    (refused,) = bench.relay.reports[-1]["refused"]
    assert refused["kind"] == "config"
    assert "h200" in refused["detail"]
    assert bench.submitter.taken == []


def test_a_folder_that_others_may_write_is_refused(bench: Bench) -> None:
    bench.launcher.site.state_dir.mkdir()
    bench.launcher.site.state_dir.chmod(0o777)
    bench.relay.orders = [ORDER]
    bench.launcher.round()
    (refused,) = bench.relay.reports[-1]["refused"]
    assert "others may write" in refused["detail"]


def test_jobs_that_begin_later_leave_room_for_others(bench: Bench) -> None:
    later, waits = "BeginTime", "Priority"
    for reasons in ([], [later] * 9, [later, waits, waits, waits], [waits] * 9):
        bench.scheduler.jobs = [
            JobLine(name=f"edif-{number}", job_id=str(number), state="pending", reason=reason)
            for number, reason in enumerate(reasons)
        ]
        bench.launcher.round()
    bench.scheduler.jobs = None
    bench.launcher.round()
    assert bench.relay.limits == [4, 4, 1, 0, 0]


def test_a_job_whose_id_nobody_reported_is_cancelled_by_its_name(bench: Bench) -> None:
    bench.relay.orders = [CANCEL]
    bench.scheduler.jobs = [JobLine(name=NAME, job_id="8", state="pending")]
    done = bench.launcher.round()
    assert bench.scheduler.ended == [("8", NAME)]
    assert done.cancelled == [NAME]
    assert bench.relay.reports[-1]["cancelled"] == [CANCEL["allocation"]]


def test_of_two_launchers_on_one_file_system_one_works(bench: Bench) -> None:
    with (
        only_one(bench.launcher.site),
        pytest.raises(LaunchError, match="another launcher"),
        only_one(bench.launcher.site),
    ):
        pass


def test_a_file_system_without_locks_does_not_keep_launchers_away(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_file: object, _how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with only_one(bench.launcher.site):
        pass


def test_the_daemon_outlives_the_relay_and_says_a_thing_once(bench: Bench) -> None:
    stop, told = threading.Event(), []

    def tell(text: str) -> None:
        told.append(text)
        if text.startswith("submitted"):
            stop.set()

    bench.relay.failing = [Unavailable("the relay is away"), Unavailable("the relay is away")]
    bench.relay.orders = [ORDER]
    serve(bench.launcher, interval_s=0.01, tell=tell, stop=stop)
    assert told == ["the relay is away", f"submitted {NAME} as job 17"]


def test_the_daemon_outlives_a_round_that_fails(bench: Bench) -> None:
    """One job with an odd name, say, must not end what all slots of the site depend on."""
    stop, told = threading.Event(), []

    def tell(text: str) -> None:
        told.append(text)
        if text.startswith("submitted"):
            stop.set()

    refused = InvalidInput("the body cannot be read")
    bench.relay.failing = [refused, OSError(30, "Read-only file system")]
    bench.relay.orders = [ORDER]
    serve(bench.launcher, interval_s=0.01, tell=tell, stop=stop)
    assert told[0] == "the body cannot be read"
    assert "Read-only file system" in told[1]
    assert told[2] == f"submitted {NAME} as job 17"


def test_a_scheduler_that_says_too_much_is_cut_short(bench: Bench) -> None:
    bench.relay.orders = [ORDER]
    for error in (SubmitUnknown("x" * 9000), SubmitRefused("x" * 9000, kind="config")):
        bench.submitter.outcome = raising(error)
        bench.launcher.round()
    details = [each["detail"] for each in bench.relay.reports]
    details += [line["detail"] for each in bench.relay.reports for line in each.get("refused", [])]
    assert sorted(map(len, details))[-2:] == [4000, 4000]


def test_the_daemon_ends_when_its_token_is_not_good_any_more(bench: Bench) -> None:
    bench.relay.failing = [NotAuthenticated("revoked")]
    with pytest.raises(NotAuthenticated):
        serve(bench.launcher, interval_s=0.01, tell=lambda _: None, stop=threading.Event())


def test_it_reads_the_log_of_a_job_that_is_gone(bench: Bench) -> None:
    folder = folder_of(bench.launcher.site, NAME)
    folder.mkdir(parents=True)
    (folder / "77_0_log.out").write_text("".join(f"line {n}\n" for n in range(20)))
    order = {"kind": "words", "allocation": "abcdef0123456789", "name": NAME}
    bench.relay.orders = [order | {"job_id": "77"}, order | {"job_id": "78"}]
    bench.launcher.round()
    said = [each["words"] for each in bench.relay.reports if "words" in each]
    lines = "\n".join(f"line {n}" for n in range(12, 20))
    assert [each["detail"] for (each,) in said] == [lines, ""]
