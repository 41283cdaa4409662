"""The command line of a worker's container, and the files beside it."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path

import pytest

from edif_hpc.slurm.container import (
    Layout,
    env_file,
    environment,
    exec_argv,
    host_environment,
)
from edif_hpc.slurm.order import ContainerOrder

SECRET = "s3cret"
IMAGE = Path("/fast/abc.sif")
LAYOUT = Layout.below(Path("/scratch/a"), hub_cache=None, hub_cache_writable=False)


def order(**facts: object) -> ContainerOrder:
    return ContainerOrder(**{"image": "/images/worker.sif", **facts})  # type: ignore[arg-type]


def argv(made: ContainerOrder | None = None, layout: Layout = LAYOUT) -> list[str]:
    return exec_argv(made or order(), layout, image=IMAGE, command=["python", "-m", "worker"])


def mounts(words: list[str]) -> dict[str, tuple[str, bool]]:
    """By the path inside: the path on the node, and whether it may be written."""
    found = {}
    for word in words:
        if word.startswith("--mount="):
            (fields,) = csv.reader([word.removeprefix("--mount=")])
            facts = dict(each.partition("=")[::2] for each in fields)
            found[facts["destination"]] = (facts["source"], "ro" not in facts)
    return found


def test_the_whole_command_line() -> None:
    assert argv() == [
        "apptainer", "--quiet", "exec", "--containall", "--no-home", "--no-eval", "--pwd", "/",
        "--env-file", "/scratch/a/worker.env",
        '--mount="type=bind","source=/scratch/a/tmp","destination=/tmp"',
        '--mount="type=bind","source=/scratch/a/worker","destination=/scratch/a/worker"',
        '--mount="type=bind","source=/scratch/a/worker.order","destination=/scratch/a/worker.order",ro',
        "/fast/abc.sif", "python", "-m", "worker",
    ]  # fmt: skip


def test_what_the_checked_copy_is_run_from() -> None:
    words = argv(order(image="/images/worker.sif", apptainer="/opt/apptainer"))
    assert words[0] == "/opt/apptainer"
    assert "/images/worker.sif" not in words


@pytest.mark.parametrize(
    ("vendor", "flags"), [("nvidia", {"--nv"}), ("amd", {"--rocm"}), ("none", set())]
)
def test_the_flag_of_each_vendor(vendor: str, flags: set[str]) -> None:
    assert set(argv(order(vendor=vendor))) & {"--nv", "--rocm"} == flags


def test_nothing_that_breaks_signals_or_makes_it_writable() -> None:
    forbidden = {"--no-init", "--compat", "--writable", "--writable-tmpfs", "--fakeroot", "--env"}
    assert not forbidden & set(argv(order(vendor="amd", binds=("/data",))))


@pytest.mark.parametrize("writable", [True, False])
def test_the_hubs_cache(writable: bool) -> None:
    layout = Layout.below(Path("/scratch/a"), hub_cache=Path("/hub"), hub_cache_writable=writable)
    assert mounts(argv(layout=layout))["/hub"] == ("/hub", writable)


def test_stores_and_libraries_are_let_in_for_reading() -> None:
    readable = (Path("/data/sets"), Path("/data/python"))
    layout = Layout.below(
        Path("/scratch/a"), hub_cache=None, hub_cache_writable=False, readable=readable
    )
    found = mounts(argv(layout=layout))
    assert {found[str(each)] for each in readable} == {(str(each), False) for each in readable}


def test_paths_with_commas_colons_and_quotes_are_one_mount() -> None:
    folder = Path('/scratch/a, "b":c')
    layout = Layout.below(folder, hub_cache=None, hub_cache_writable=False)
    found = mounts(argv(layout=layout))
    assert found[str(folder / "worker")] == (str(folder / "worker"), True)


def test_the_sites_own_binds_follow_as_they_are() -> None:
    words = argv(order(binds=("/models:/models:ro", "/a,/b")))
    assert [each for each in words if each.startswith("--bind")] == [
        "--bind=/models:/models:ro",
        "--bind=/a,/b",
    ]


def test_the_environment_knows_nothing_of_the_host() -> None:
    host = {"HF_TOKEN": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "SLURM_JOB_ID": "1", "PATH": "/x"}
    inside = environment(order(env={"NCCL_DEBUG": "WARN"}), LAYOUT, host)
    assert inside == {
        "HOME": "/scratch/a/worker", "TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "NCCL_DEBUG": "WARN",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("vendor", "name"),
    [("nvidia", "CUDA_VISIBLE_DEVICES"), ("amd", "ROCR_VISIBLE_DEVICES"), ("none", None)],
)
def test_the_choice_of_devices_is_the_vendors_own(vendor: str, name: str | None) -> None:
    """Slurm sets all of them where the site has not said which."""
    choices = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
    inside = environment(order(vendor=vendor), LAYOUT, dict.fromkeys(choices, "2,3"))
    assert [each for each in inside if each in choices] == ([name] if name else [])


def test_no_secret_on_the_host_side_either() -> None:
    host = host_environment(LAYOUT, {"HF_TOKEN": SECRET, "PATH": "/bin", "LD_PRELOAD": "x"})
    assert host["PATH"] == "/bin"
    assert not {"HF_TOKEN", "LD_PRELOAD"} & set(host)
    assert host["APPTAINER_CONFIGDIR"].startswith("/scratch/a/")


def test_a_site_cannot_be_overridden_by_the_environment_of_the_job() -> None:
    """Apptainer takes options from APPTAINER_ variables; what the submitter had is not ours to follow."""
    host = host_environment(LAYOUT, {"APPTAINER_BIND": "/etc", "APPTAINERENV_X": "1"})
    assert not {"APPTAINER_BIND", "APPTAINERENV_X"} & set(host)


def test_the_env_file_says_any_value(tmp_path: Path) -> None:
    values = {"A": "plain", "B": "two words", "C": "quote ' and \" and $HOME `id`", "D": "a\nb"}
    file = tmp_path / "worker.env"
    file.write_text(env_file(values))
    show = f"set -a; . {file}; exec env -0"
    seen = subprocess.run(["sh", "-c", show], capture_output=True, text=True, check=True, env={})
    told = dict(each.split("=", 1) for each in seen.stdout.split("\0") if each)
    assert {name: told[name] for name in values} == values
