from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edif_hpc.errors import LaunchError, SubmitRefused
from edif_hpc.slurm.site import Gpu, Site
from edif_hpc.slurm.submit import Submission, check_folder, submission_for
from edif_hpc.slurm.submitting import signal_lead_s

A6000 = Gpu(
    partition="gpu", gres="gpu:a6000", vendor="nvidia", max_walltime_min=60, cpus=4, mem_gb=30,
    account="lab", options={"nice": "10"},
)  # fmt: skip
SHORT = Gpu(
    partition="short", gres="gpu:a6000", vendor="nvidia", max_walltime_min=5, cpus=4, mem_gb=30
)
PATHS: dict[str, Any] = {"order": Path("/shared/order"), "folder": Path("/shared/folder")}


def site(**gpus: Gpu) -> Site:
    return Site(name="here", scheduler="slurm", state_dir=Path("/shared"), gpus=gpus)


def test_a_submission_asks_for_what_the_site_says_times_the_gpus() -> None:
    made = submission_for(
        site(a6000=A6000), gpu=None, gpus=2, walltime_min=60, name="edif-a-0-1-aa", **PATHS
    )
    assert (made.partition, made.gres, made.cpus, made.mem_gb) == ("gpu", "gpu:a6000:2", 8, 60)
    assert (made.account, made.extra, made.walltime_min) == ("lab", {"nice": "10"}, 60)


def test_no_gpu_is_no_gres() -> None:
    made = submission_for(
        site(a6000=A6000), gpu="a6000", gpus=0, walltime_min=1, name="edif-a-0-1-aa", **PATHS
    )
    assert (made.gres, made.cpus, made.mem_gb) == (None, 4, 30)


@pytest.mark.parametrize(
    ("gpu", "walltime_min", "match"),
    [
        ("h100", 1, "no GPU called 'h100'; it has: a6000, short"),
        (None, 1, "it has: a6000, short"),
        ("short", 6, "6 min on short of here: at most 5 min"),
    ],
)
def test_what_a_site_has_not_got_is_refused(
    gpu: str | None, walltime_min: int, match: str
) -> None:
    both = site(a6000=A6000, short=SHORT)
    with pytest.raises(SubmitRefused, match=match) as refused:
        submission_for(
            both, gpu=gpu, gpus=1, walltime_min=walltime_min, name="edif-a-0-1-aa", **PATHS
        )
    assert refused.value.kind == "config"


@pytest.mark.parametrize(
    "facts",
    [
        {"name": "edif a"},
        {"name": "edif\n#SBATCH --uid=0"},
        {"name": "-edif"},
        {"name": "edif-a", "exclude": ("node1", "node2 --uid=0")},
        {"name": "edif-a", "dependency": "after:1;touch /tmp/x"},
    ],
)
def test_what_goes_into_a_script_is_checked(facts: dict[str, Any]) -> None:
    with pytest.raises(SubmitRefused):
        Submission(**PATHS, **facts)


def test_a_folder_is_made_for_its_owner(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
    (tmp_path / "new").chmod(0o720)
    with pytest.raises(LaunchError, match="others may write"):
        check_folder(tmp_path / "new")


@pytest.mark.parametrize(
    ("walltime_min", "asked_s", "lead_s"), [(60, 120, 120), (2, 120, 30), (1, 120, 1), (6000, 9**9, 65535)]
)  # fmt: skip
def test_a_job_that_has_just_started_is_not_told_of_its_end(
    walltime_min: int, asked_s: int, lead_s: int
) -> None:
    submission = Submission(
        name="edif-a-0-1-aa", walltime_min=walltime_min, signal_lead_s=asked_s, **PATHS
    )
    assert signal_lead_s(submission) == lead_s
