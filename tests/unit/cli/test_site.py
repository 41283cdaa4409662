"""`site`: from what a cluster tells to a file, and what sbatch would say to it."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit
from edif_hpc.cli.sites.checks import advice
from edif_hpc.cli.sites.file import text_of, with_may_submit
from edif_hpc.cli.sites.proposing import Asker, propose
from edif_hpc.errors import NotFound
from edif_hpc.slurm.detect import Account, Cluster, GpuKind, Partition
from edif_hpc.slurm.site import load_site
from edif_hpc.testing.fake_slurm.cluster import MAX_MIN, FakeSlurm, fake_slurm

CLUSTER = Cluster(
    name="Deep Thought",
    version="24.05.1",
    partitions={
        "gpu": Partition(name="gpu", max_walltime_min=2880, accounts=("bio", "physics")),
        "short": Partition(name="short", max_walltime_min=60),
        "down": Partition(name="down", up=False),
    },
    gpus=(
        GpuKind(partition="short", gres="gpu:a100", nodes=1, per_node=4, cpus=64, mem_gb=500, vendor="nvidia"),
        GpuKind(partition="gpu", gres="gpu:a100", nodes=3, per_node=4, cpus=64, mem_gb=500, vendor="nvidia"),
        GpuKind(partition="gpu", gres="gpu:mi300x", nodes=1, per_node=8, cpus=4, mem_gb=2000, vendor="amd"),
        GpuKind(partition="gpu", gres="gpu", nodes=1, per_node=1, cpus=4, mem_gb=0),
        GpuKind(partition="down", gres="gpu:h100", nodes=1, per_node=1, cpus=4, mem_gb=10),
    ),
    accounts=(Account(name="chemistry", default=True, qos=("normal",)), Account(name="physics")),
    node_tmp="/local",
)  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path, environ: dict[str, str]) -> Iterator[FakeSlurm]:
    """A fake cluster whose programs are found by the commands, and a home."""
    with fake_slurm(tmp_path / "slurm") as fake:
        environ |= fake.environ | {"HOME": str(tmp_path / "home")}
        yield fake


@pytest.fixture
def file(environ: dict[str, str]) -> Path:
    """Where the site `hpc` has its file."""
    return Path(environ["EDIF_CONFIG"]).parent / "sites" / "hpc.toml"


def proposed(**given: Any) -> dict[str, Any]:
    """The file that is written about CLUSTER, read as TOML."""
    answers = propose(CLUSTER, given, Asker(given, yes=True), home="/home/ada")
    return tomllib.loads(text_of(answers))


# -- what is proposed --------------------------------------------------------------------------------------------------------


def test_each_kind_of_each_partition_that_is_up_has_a_table() -> None:
    gpus = proposed()["gpus"]
    assert set(gpus) == {"a100", "a100-short", "mi300x", "gpu"}
    assert (gpus["a100"]["partition"], gpus["a100"]["max_walltime_min"]) == ("gpu", 2880)
    assert gpus["a100-short"]["max_walltime_min"] == 60
    assert (gpus["mi300x"]["vendor"], gpus["mi300x"]["gres"]) == ("amd", "gpu:mi300x")


def test_a_gpu_has_its_share_of_a_node() -> None:
    gpus = proposed()["gpus"]
    assert (gpus["a100"]["cpus"], gpus["a100"]["mem_gb"]) == (16, 112)
    assert (gpus["mi300x"]["cpus"], gpus["gpu"]["mem_gb"]) == (1, 1), "never less than one"


def test_the_account_is_one_that_the_partition_lets_in() -> None:
    gpus = proposed()["gpus"]
    assert gpus["a100"]["account"] == "physics", "the default one may not"
    assert gpus["a100-short"]["account"] == "chemistry"


def test_what_is_asked_for_alone() -> None:
    assert set(proposed(gpu=("mi300x",))["gpus"]) == {"mi300x"}
    assert set(proposed(partition=("short",))["gpus"]) == {"a100"}
    with pytest.raises(NotFound, match=r"GPUs called v100 .* there are: gpu:a100 in short, "):
        proposed(gpu=("v100",))


def test_names_that_do_not_tell_the_vendor_are_said_so() -> None:
    given: dict[str, Any] = {"gpu": ("gpu",)}
    text = text_of(propose(CLUSTER, given, Asker(given, yes=True), home="/h"))
    assert "its names do not tell the vendor: check it" in text
    assert proposed(gpu=("gpu",), vendor="amd")["gpus"]["gpu"]["vendor"] == "amd"


def test_flags_answer(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "name": "hpc", "state_dir": "/shared/x", "scratch": "$TMPDIR", "image": 'a "b".sif', "setup": ("module load a", "x"),
        "hub_cache": "/models", "python": "/py", "account": "bio", "qos": "long", "compute_may_submit": False,
    }  # fmt: skip
    path = tmp_path / "hpc.toml"
    path.write_text(text_of(propose(CLUSTER, given, Asker(given, yes=True), home="/h")))
    site = load_site(path)
    assert (site.name, str(site.state_dir), site.scratch) == ("hpc", "/shared/x", "$TMPDIR")
    assert (site.setup, site.python) == (("module load a", "x"), "/py")
    assert site.container is not None
    assert site.container.image == 'a "b".sif'
    assert site.engine.hub_cache == "/models"
    assert site.compute_may_submit is False
    assert (site.gpus["a100"].account, site.gpus["a100"].qos) == ("bio", "long")


def test_defaults() -> None:
    file = proposed()
    assert (file["name"], file["state_dir"], file["scratch"]) == ("deep-thought", "/home/ada/edif-hpc/state", "/local")  # fmt: skip
    assert not {"python", "container", "engine", "compute_may_submit", "setup"} & set(file)


@pytest.mark.parametrize("text", ["a = 1\n# compute_may_submit = true\n", "a = 1\n", "a = 1\n\n[gpus.x]\nb = 2\n"])  # fmt: skip
def test_what_was_open_is_filled_in(text: str) -> None:
    changed = with_may_submit(text, may=False)
    assert changed is not None
    assert tomllib.loads(changed) == tomllib.loads(text) | {"compute_may_submit": False}


def test_what_an_operator_has_set_stays() -> None:
    assert with_may_submit("compute_may_submit = true\n", may=False) is None


@pytest.mark.parametrize(
    ("words", "way"),
    [
        ("Invalid account or account/partition combination specified", "set `account`"),
        ("Invalid qos specification", "set `qos`"),
        ("invalid partition specified: nope", "set `partition`"),
        ("Requested node configuration is not available", "no node has that much"),
        ("Invalid generic resource (gres) specification", "set `gres`"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "lower `max_walltime_min`"),
        ("User's group not permitted to use this partition", "your group may not"),
        ("The moon is full", "the scheduler's own words"),
    ],
)  # fmt: skip
def test_advice(words: str, way: str) -> None:
    assert way in advice(words)


# -- the commands ------------------------------------------------------------------------------------------------------------


def test_init_writes_a_file_for_its_owner_alone(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    result = run("site", "init", "hpc", "--yes", "--json")
    assert result.exit_code == Exit.OK, result.output
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    site = load_site(file)
    assert set(site.gpus) == {"a6000", "mi300x"}
    assert {each.max_walltime_min for each in site.gpus.values()} == {MAX_MIN}
    told = {each["what"]: each for each in json.loads(result.stdout)["findings"]}
    assert "to start at" in told["a6000: sbatch --test-only"]["seen"]
    assert list(site.state_dir.iterdir()) == [], "a dry run leaves nothing behind"
    assert slurm.jobs() == []


def test_init_asks(slurm: FakeSlurm, environ: dict[str, str], file: Path) -> None:
    from click.testing import CliRunner

    from edif_hpc.cli.main import main

    answers = ["hpc", "", "", str(file.parent / "state"), "$SCRATCH", "", "", "", ""]
    answers += ["connect", "proxy:3128"]
    result = CliRunner().invoke(
        main, ["site", "init"], env=environ, input="\n".join(answers) + "\n"
    )
    assert result.exit_code == Exit.OK, result.output
    assert "Fast folder of a compute node [/tmp]:" in result.stderr
    site = load_site(file)
    assert (site.scratch, site.route, site.proxy) == ("$SCRATCH", "connect", "proxy:3128")


def test_init_takes_a_route(slurm: FakeSlurm, run: Callable[..., Any], file: Path) -> None:
    assert run("site", "init", "hpc", "--yes", "--route", "login").exit_code in (
        Exit.OK,
        Exit.FAILED,
    )
    assert load_site(file).route == "login"


def test_init_refuses_a_route_without_its_proxy(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    result = run("site", "init", "hpc", "--yes", "--route", "socks")
    assert result.exit_code == Exit.SETTINGS
    assert "the route 'socks' needs it, as HOST:PORT" in result.stderr
    assert not file.exists()


def test_init_names_the_flag_when_nobody_answers(
    slurm: FakeSlurm, run: Callable[..., Any]
) -> None:
    result = run("site", "init", "hpc")
    assert result.exit_code == Exit.USAGE
    assert "give --account, or --yes for all defaults" in result.stderr.splitlines()[-1]


def test_init_never_overwrites(
    slurm: FakeSlurm, run: Callable[..., Any], complain: Callable[..., str], file: Path
) -> None:
    run("site", "init", "hpc", "--yes")
    file.write_text(file.read_text() + "# mine\n")
    assert "--force writes it anew" in complain(Exit.REFUSED, "site", "init", "hpc", "--yes")
    assert file.read_text().endswith("# mine\n")
    assert run("site", "init", "hpc", "--yes", "--force").exit_code == Exit.OK
    assert not file.read_text().endswith("# mine\n")


def test_init_never_overwrites_what_it_named_itself(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    assert run("site", "init", "--yes").exit_code == Exit.OK
    made = file.with_name("fake.toml")
    made.write_text(made.read_text() + "# mine\n")
    result = run("site", "init", "--yes")
    assert result.exit_code == Exit.REFUSED
    assert made.read_text().endswith("# mine\n")


def test_init_where_there_is_no_slurm(
    complain: Callable[..., str], tmp_path: Path, file: Path
) -> None:
    said = complain(Exit.UNREACHABLE, "site", "init", "hpc", "--yes", PATH=str(tmp_path))
    assert "sinfo cannot be run here" in said
    assert not file.exists()


def test_init_while_the_controller_is_away(
    slurm: FakeSlurm, complain: Callable[..., str], file: Path
) -> None:
    slurm.stop_controller()
    assert "Unable to contact slurm controller" in complain(Exit.UNREACHABLE, "site", "init", "hpc", "--yes")  # fmt: skip
    assert not file.exists()


def made(run: Callable[..., Any], file: Path, old: str, new: str) -> None:
    """A file by `init`, with one thing changed."""
    run("site", "init", "hpc", "--yes")
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "what", "said"),
    [
        ("max_walltime_min = 5", "max_walltime_min = 60", "a6000: partition", "a6000 allows 5"),
        ('partition = "a6000"', 'partition = "nope"', "a6000: partition", "there is no nope; there are: a6000, mi300x"),
        ('partition = "a6000"', 'partition = "nope"', "a6000: sbatch --test-only", "Invalid partition name specified"),
        ('gres = "gpu:a6000"', 'gres = "gpu:h100"', "a6000: partition", "a6000 has no gpu:h100; it has: gpu:a6000"),
        ('route = "direct"', 'route = "login"', "route login", "no forwarder is known"),
        ("# [container]\n#", '[container]\nimage = "/nope.sif"\n#', "image", "/nope.sif cannot be read here"),
    ],
)  # fmt: skip
def test_check_tells_what_is_wrong(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path, old: str, new: str, what: str, said: str
) -> None:
    made(run, file, old, new)
    result = run("site", "check", "hpc", "--json")
    assert result.exit_code == Exit.FAILED
    [found] = [each for each in json.loads(result.stdout)["findings"] if each["what"] == what]
    assert found["grade"] == "FAIL"
    assert said in found["seen"]
    assert found["way_out"]


def test_check_survives_an_sbatch_that_does_not_answer(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    run("site", "init", "hpc", "--yes")
    slurm.fault("sbatch", "socket_timed_out")
    result = run("site", "check", "hpc")
    assert result.exit_code == Exit.OK
    assert "WARN  a6000: sbatch --test-only: " in result.stdout
    assert "the controller is away: try again" in result.stdout


def test_a_state_dir_that_others_may_write_is_refused(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    run("site", "init", "hpc", "--yes")
    load_site(file).state_dir.chmod(0o777)
    result = run("site", "check", "hpc")
    assert result.exit_code == Exit.FAILED
    assert "chmod 700" in result.stdout


def test_a_probe_that_does_not_start_is_cancelled(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    run("site", "init", "hpc", "--yes", "--gpu", "a6000")
    slurm.fault("sbatch", "hold", times=3)
    result = run("site", "check", "hpc", "--probe", "--timeout", "0s")
    assert result.exit_code == Exit.FAILED
    assert "pending (JobHeldUser)" in result.stdout
    assert "release it: scontrol release" in result.stdout
    assert [job.state for job in slurm.jobs()] == ["CANCELLED"]


def test_there_is_no_probe_while_a_check_fails(
    slurm: FakeSlurm, run: Callable[..., Any], file: Path
) -> None:
    made(run, file, "max_walltime_min = 5", "max_walltime_min = 60")
    assert "mend it first" in run("site", "check", "hpc", "--probe").stderr
    assert slurm.jobs() == []


def test_show_and_ls(slurm: FakeSlurm, run: Callable[..., Any], file: Path) -> None:
    run("site", "init", "hpc", "--yes")
    assert json.loads(run("site", "show", "hpc", "--json").stdout)["file"] == str(file)
    shown = run("site", "show", "hpc").stdout
    assert "gpu:mi300x" in shown
    assert "compute may submit  yes" in shown
    assert "a6000, mi300x" in run("site", "ls").stdout


def test_a_site_that_is_not_there(complain: Callable[..., str]) -> None:
    assert "has none yet; make one on a login node: edif-hpc site init" in complain(Exit.SETTINGS, "site", "check", "hpc")  # fmt: skip


def test_doctor_checks_sites(slurm: FakeSlurm, run: Callable[..., Any], file: Path) -> None:
    made(run, file, "max_walltime_min = 5", "max_walltime_min = 60")
    told = run("doctor").stdout
    assert "FAIL  site hpc, a6000: partition: max_walltime_min is 60, and a6000 allows 5" in told
    assert "mi300x: partition" not in told, "in brief: what is in order has no line"
