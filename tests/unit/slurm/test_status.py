from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from edif_hpc.errors import InvalidInput, SlurmUnavailable
from edif_hpc.slurm.commands import Answer
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.status import FORMAT, JobLine, Slurm, read_duration, read_listing
from edif_hpc.testing.clock import ManualClock

HEAD = "NAME|JOBID|STATE|REASON|NODELIST|START_TIME|TIME_LEFT|COMMENT\n"
NOW = 1_796_212_800.0  # 2026-12-02T12:00:00 UTC
SITE = Site(name="here", scheduler="slurm", state_dir=Path("/shared"))


@dataclass
class Recorded:
    """Answers what it was given, and remembers what it was asked."""

    code: int = 0
    out: str = ""
    err: str = ""
    error: OSError | None = None
    asked: list[list[str]] = field(default_factory=list)

    def __call__(self, argv: Sequence[str], *, timeout_s: float, stdin: str = "") -> Answer:
        assert timeout_s > 0
        assert not stdin
        self.asked.append(list(argv))
        if self.error is not None:
            raise self.error
        return Answer(code=self.code, out=self.out, err=self.err)


def slurm(run: Recorded) -> Slurm:
    return Slurm(SITE, run=run, clock=ManualClock(wall_s=NOW))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0:00", 0),
        ("1:39:00", 5940),
        ("2-03:04:05", 183_845),
        ("59:01", 3541),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("INVALID", None),
        ("N/A", None),
        ("", None),
    ],
)
def test_durations(text: str, seconds: float | None) -> None:
    assert read_duration(text) == seconds


def test_a_listing() -> None:
    text = HEAD + (
        "edif-a-0-1-aa|17|RUNNING|None|node1|2026-12-02T11:00:00|1-00:00:30|edif-a-0-1-aa\n"
        "edif-a-0-2-bb|18|PENDING|Resources||2026-12-02T12:10:00|1-01:00:00|edif-a-0-2-bb\n"
        "edif-a-1-1-cc|19|PENDING|Priority||N/A|UNLIMITED|(null)\n"
        "edif-a-2-1-dd|20|COMPLETING|None|node[1-2]|2026-12-02T11:00:00|0:00|x|y|z\n"
        "edif-a-3-1-ee|21|EXPEDITING|None|node3|2026-12-02T11:59:00|10:00|\n"
        "thesis|22|RUNNING|None|node2|2026-12-02T11:00:00|1:00:00|(null)\n"
        "renamed|23|PENDING|launch failed requeued held||N/A|1:00:00|edif-a-4-1-ff\n"
    )
    assert read_listing(text, now=NOW) == [
        JobLine(name="edif-a-0-1-aa", job_id="17", state="running", node="node1", left_s=86_430),
        JobLine(
            name="edif-a-0-2-bb", job_id="18", state="pending", reason="Resources", start_in_s=600
        ),
        JobLine(name="edif-a-1-1-cc", job_id="19", state="pending", reason="Priority"),
        JobLine(name="edif-a-2-1-dd", job_id="20", state="completing", node="node[1-2]", left_s=0),
        JobLine(name="edif-a-3-1-ee", job_id="21", state="expediting", node="node3", left_s=600),
        JobLine(
            name="edif-a-4-1-ff",
            job_id="23",
            state="pending",
            reason="launch failed requeued held",
        ),
    ]


def test_no_jobs_is_an_answer() -> None:
    assert read_listing(HEAD, now=NOW) == []


def test_what_other_jobs_are_called_does_not_hide_ours() -> None:
    """Names and comments may hold anything, also line breaks; none of it is ours."""
    ours = "edif-a-0-1-aa|17|PENDING|Priority||N/A|1:00|edif-a-0-1-aa"
    others = [
        "two\nlines|18|PENDING|Priority||N/A|1:00|(null)",
        "thesis|19|PENDING|Priority||N/A|1:00|one\n\ntwo|and pipes\u2028three\x0b",
        f"edif-{'x' * 600}|20|PENDING|Priority||N/A|1:00|(null)",
        "edif-x|y|21|PENDING|Priority||N/A|1:00|(null)",
    ]
    found = read_listing(HEAD + "\n".join([*others, ours, *others]) + "\n", now=NOW)
    assert [each.name for each in found] == ["edif-a-0-1-aa"]


def test_a_reason_that_names_a_whole_cluster_is_cut() -> None:
    nodes = ",".join(f"node{number}" for number in range(200))
    line = f"edif-a-0-1-aa|17|PENDING|ReqNodeNotAvail, UnavailableNodes:{nodes}||N/A|1:00|\n"
    (found,) = read_listing(HEAD + line, now=NOW)
    assert found.reason.startswith("ReqNodeNotAvail, UnavailableNodes:node0")
    assert len(found.reason) == 400


@pytest.mark.parametrize(
    "text",
    ["", "\n", "slurm is away\n", HEAD[:-1], HEAD + "edif-a-0-1-aa|17", HEAD + "\nthesis|18"],
)
def test_what_is_no_listing_tells_nothing(text: str) -> None:
    with pytest.raises(SlurmUnavailable):
        read_listing(text, now=NOW)


def test_one_call_lists_all() -> None:
    run = Recorded(out=HEAD)
    assert slurm(run).list_jobs() == []
    assert run.asked == [["squeue", "--me", "--all", "-o", FORMAT]]


@pytest.mark.parametrize(
    "run",
    [
        Recorded(code=1, err="slurm_load_jobs error: Socket timed out on send/recv operation"),
        Recorded(code=1, out=HEAD),
        Recorded(out=""),
        Recorded(error=TimeoutError("squeue did not answer within 20 s")),
        Recorded(error=FileNotFoundError(2, "No such file or directory", "squeue")),
    ],
    ids=["error", "failed", "empty", "hangs", "absent"],
)
def test_every_failure_is_unknown(run: Recorded) -> None:
    with pytest.raises(SlurmUnavailable, match="squeue"):
        slurm(run).find("edif-a-0-1-aa")


def test_of_two_with_a_name_the_oldest_counts() -> None:
    line = "edif-a-0-1-aa|{}|PENDING|Priority||N/A|1:00|\n"
    found = slurm(Recorded(out=HEAD + line.format(100) + line.format(99))).find("edif-a-0-1-aa")
    assert found is not None
    assert found.job_id == "99"


def test_cancelling_what_is_over_is_done() -> None:
    over = "scancel: error: Kill job error on job id 17: Invalid job id specified"
    run = Recorded(code=1, err=over)
    slurm(run).cancel("17", name="edif-a-0-1-aa")
    assert run.asked == [["scancel", "--name=edif-a-0-1-aa", "17"]]
    with pytest.raises(SlurmUnavailable):
        slurm(Recorded(code=1, err="Unable to contact slurm controller")).cancel("17", name="x")


@pytest.mark.parametrize("job_id", ["", "-u root", "17 18", "17\n", "all"])
def test_only_an_id_is_cancelled(job_id: str) -> None:
    run = Recorded()
    with pytest.raises(InvalidInput):
        slurm(run).cancel(job_id, name="edif-a-0-1-aa")
    assert run.asked == []


@pytest.mark.parametrize(
    ("said", "left_s"),
    [
        ("JobId=17 JobName=x StartTime=2026-12-02T11:00:00 EndTime=2026-12-02T12:01:30 Deadline=N/A", 90),
        ("JobId=17 EndTime=2026-12-02T11:59:00 Deadline=N/A", 0),
        ("JobId=17 StartTime=Unknown EndTime=Unknown Deadline=N/A", None),
        ("JobId=17 PreemptEligibleTime=2026-12-02T12:01:30", None),
    ],
)  # fmt: skip
def test_what_is_left_of_a_job(said: str, left_s: float | None) -> None:
    assert slurm(Recorded(out=said)).left_s("17") == left_s


def test_nothing_is_left_of_what_slurm_forgot() -> None:
    gone = Recorded(code=1, err="slurm_load_jobs error: Invalid job id specified")
    assert slurm(gone).left_s("17") is None
    with pytest.raises(SlurmUnavailable):
        slurm(Recorded(code=1, err="Unable to contact slurm controller")).left_s("17")
