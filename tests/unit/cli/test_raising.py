"""`up --site`: what is refused before anything is asked for, who submits, and what is said while it waits."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit
from edif_hpc.slurm.site import load_site
from edif_hpc.testing.fake_slurm.cluster import FakeSlurm, fake_slurm

SITE = """\
name = "hpc"
scheduler = "slurm"
state_dir = "{root}/state"
[gpus.a6000]
partition = "a6000"
gres = "gpu:a6000"
vendor = "nvidia"
max_walltime_min = 5
cpus = 1
mem_gb = 1
[gpus.mi300x]
partition = "mi300x"
gres = "gpu:mi300x"
vendor = "amd"
max_walltime_min = 4
cpus = 1
mem_gb = 1
"""
TINY = {"name": "tiny", "repo_id": "edif/tiny-gpt2", "site": None, "gpu": None, "gpus": 1, "walltime_min": None, "replicas": 1}  # fmt: skip
OURS = "edif-tiny-0-1-00000001"
ORDER = {
    "kind": "submit", "allocation": "a1", "name": OURS, "join_token": "once", "deployment": "tiny", "slot": 0, "generation": 1,
    "gpu": "a6000", "gpus": 1, "walltime_min": 5, "exclude": [], "begin_after_s": 0.0,
}  # fmt: skip
HEARD = {"hpc": {"name": "login2-1", "silent_s": 4.0}}


@pytest.fixture
def slurm(tmp_path: Path, environ: dict[str, str]) -> Iterator[FakeSlurm]:
    """A fake cluster with a site file."""
    with fake_slurm(tmp_path / "slurm") as fake:
        environ |= fake.environ
        sites = Path(environ["EDIF_CONFIG"]).parent / "sites"
        sites.mkdir()
        (sites / "hpc.toml").write_text(SITE.format(root=fake.root))
        yield fake


def line(**facts: Any) -> dict[str, Any]:
    return {
        "allocation": "a1", "name": OURS, "deployment": "tiny", "slot": 0, "generation": 1, "site": "hpc", "job_id": None,
        "node": None, "state": "ordered", "detail": "", "submitted_at": 1.7e9, "warm_at": None, "worker": None, "order_holder": None,
        "reason": None, "start_in_s": None, **facts,
    }  # fmt: skip


WARM = line(state="warm", job_id="1", node="n1", detail="serves", worker={"state": "warm", "progress": None})  # fmt: skip


@pytest.fixture
def states(relay: Any) -> Callable[..., None]:
    """A relay that has `tiny`, and whose `ps` shows these one after the other; `before` it is asked for."""
    relay.on("GET", "/api/deployments", {"deployments": [TINY]})
    relay.on("POST", "/api/allocations", {"allocations": []})
    relay.on("GET", "/api/launchers", {"launchers": HEARD})
    relay.on("POST", "/api/launcher/report", {})
    relay.on("POST", "/api/launcher/orders", {"orders": []})
    relay.refuse("GET", "/api/slots/tiny/0", 404, "not_found", "tiny has no slot 0; it wants 1 replicas")  # fmt: skip

    def show(*lines: list[dict[str, Any]], before: list[dict[str, Any]] | None = None) -> None:
        left = [before or [], *lines]
        relay.on(
            "GET", "/api/ps", lambda _: {"processes": left.pop(0) if len(left) > 1 else left[0]}
        )

    return show


def slot(relay: Any, **facts: Any) -> None:
    """What the relay says of the slot."""
    relay.on("GET", "/api/slots/tiny/0", {"why": "", "paused": False, "generations": [], **facts})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "h100"], "has no GPU called 'h100'; it has: a6000 (up to 5 min), mi300x (up to 4 min)"),
        ([], "has several kinds of GPU; say which by --gpu: a6000 (up to 5 min), mi300x"),
        (["--gpu", "a6000", "--walltime", "8h"], "from 1 min to 5 min are allowed there"),
        (["--gpu", "a6000", "--walltime", "10s"], "from 1 min to 5 min are allowed there"),
    ],
)  # fmt: skip
def test_what_contradicts_the_site_is_refused_before_anything_is_written(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, complain: Callable[..., str],
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    states([])
    assert said in complain(Exit.USAGE, "up", "org/new", "--site", "hpc", *arguments)
    assert [each for each in relay.calls if each.method == "POST"] == []


def test_what_sbatch_would_not_take_is_refused_before_anything_is_written(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, complain: Callable[..., str]
) -> None:
    states([])
    said = complain(Exit.FAILED, "up", "org/new", "--site", "hpc", "--gpu", "a6000", "--gpus", "9")
    assert "Requested node configuration is not available" in said
    assert "lower `cpus` or `mem_gb`" in said
    assert [each for each in relay.calls if each.method == "POST"] == []


@pytest.mark.parametrize(
    ("known", "arguments", "asked"),
    [
        ({}, ["--gpu", "mi300x"], {"gpu": "mi300x", "walltime_min": 4}),
        ({}, ["--gpu", "a6000", "--walltime", "3min", "--replicas", "2", "--gpus", "2"],
         {"gpu": "a6000", "walltime_min": 3, "slots": 2, "gpus": 2}),
        ({"site": "hpc", "gpu": "a6000", "walltime_min": 2}, [], {"gpu": "a6000", "walltime_min": 2}),
        ({"site": "hpc", "gpu": "a6000", "walltime_min": 900}, [], {"gpu": "a6000", "walltime_min": 5}),
        ({"site": "other", "gpu": "a6000", "walltime_min": 2}, ["--gpu", "a6000"], {"gpu": "a6000", "walltime_min": 5}),
    ],
)  # fmt: skip
def test_what_is_asked_for(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any],
    known: dict[str, Any], arguments: list[str], asked: dict[str, Any],
) -> None:  # fmt: skip
    states([])
    relay.on("GET", "/api/deployments", {"deployments": [TINY | known]})
    result = run("up", "tiny", "--site", "hpc", "--no-wait", *arguments)
    assert result.exit_code == Exit.OK, result.output
    expected = {"deployment": "tiny", "site": "hpc", **asked}
    assert relay.bodies("POST", "/api/allocations") == [expected]


@pytest.mark.parametrize(
    ("arguments", "device"), [([], "cuda"), (["--device", "cpu"], "cpu")], ids=["usual", "given"]
)
def test_a_new_model_is_computed_on_the_gpu_that_is_asked_for(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any],
    arguments: list[str], device: str,
) -> None:  # fmt: skip
    states([])
    relay.on("POST", "/api/deployments", {"name": "new"})
    result = run("up", "org/new", "--site", "hpc", "--gpu", "a6000", "--no-wait", *arguments)
    assert f"added the deployment new of org/new, computed on {device}" in result.stdout
    assert relay.bodies("POST", "/api/deployments") == [{"repo_id": "org/new", "device": device}]


def test_the_device_of_a_deployment_stays(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, complain: Callable[..., str]
) -> None:
    states([])
    relay.on("GET", "/api/deployments", {"deployments": [TINY | {"device": "cpu"}]})
    said = complain(
        Exit.USAGE, "up", "tiny", "--site", "hpc", "--gpu", "a6000", "--device", "cuda"
    )
    assert "tiny is computed on cpu" in said
    assert relay.bodies("POST", "/api/allocations") == []


def test_it_only_watches_while_a_launcher_is_at_work(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    pending = line(state="submitted", job_id="7", reason="Resources", start_in_s=600.0)
    states([line()], [pending], [WARM])
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait")
    assert result.exit_code == Exit.OK, result.output
    assert result.stderr.splitlines() == [
        "tiny/0: ordered, waits for a launcher",
        "tiny/0: submitted as job 7, pending (Resources), may start in 10 min",
        "tiny/0: warm (serves) on n1",
    ]
    assert relay.bodies("POST", "/api/launcher/orders") == []
    assert "launcher" not in result.stdout


@pytest.mark.parametrize(
    "heard",
    [
        {},
        {"hpc": {"name": "login2-1", "silent_s": 900.0}},  # it was there
        {"hpc": {"name": "login2-1-passing", "silent_s": 4.0}},  # an `up` that has ended
    ],
)
def test_it_does_the_rounds_where_no_launcher_is_heard_of(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any], heard: Any
) -> None:
    states([line()], [WARM])
    relay.on("GET", "/api/launchers", {"launchers": heard})
    relay.on("POST", "/api/launcher/orders", {"orders": [ORDER]})
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait")
    assert result.exit_code == Exit.OK, result.output
    assert [job.name for job in slurm.jobs()] == [OURS]
    submitted = [each["submitted"] for each in relay.bodies("POST", "/api/launcher/report") if "submitted" in each]  # fmt: skip
    assert submitted == [[{"allocation": "a1", "job_id": "1"}]]
    assert f"submitted {OURS} as job 1" in result.stdout
    assert "keep a launcher running: edif-hpc launcher run --site hpc" in result.stdout


def test_it_does_no_rounds_beside_a_launcher_that_holds_the_lock(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any],
    environ: dict[str, str],
) -> None:  # fmt: skip
    states([line()], [WARM])
    relay.on("GET", "/api/launchers", {"launchers": {}})
    site = load_site(Path(environ["EDIF_CONFIG"]).parent / "sites" / "hpc.toml")
    site.state_dir.mkdir(mode=0o700)
    with (site.state_dir / "launcher.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait")
    assert result.exit_code == Exit.OK, result.output
    assert relay.bodies("POST", "/api/launcher/orders") == []


def test_the_last_words_of_what_died(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    states([line(state="loading", job_id="1")], [])
    folder = slurm.root / "state" / OURS
    folder.mkdir(parents=True)
    (folder / "1_0_log.out").write_text("loading\nOSError: no such model\n")
    slot(
        relay, paused=True, why="3 allocations in a row died before they were warm. Mend it, then: edif-hpc up",
        generations=[{"name": OURS, "cause": "crashed", "detail": "of the relay"}],
    )  # fmt: skip
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait")
    assert result.exit_code == Exit.FAILED
    said = result.stderr.splitlines()
    assert "  OSError: no such model" in said
    assert f"{OURS} ended before it was warm: crashed" in said
    assert "tiny does not come up: 3 allocations in a row died" in said[-1]


def test_it_does_not_wait_for_ever(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    states([line()])
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait", "--timeout", "0s")
    assert result.exit_code == Exit.FAILED
    assert "it goes on, see: edif-hpc ps, edif-hpc explain tiny" in result.stderr


def test_it_outlasts_a_relay_that_is_started_anew(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    states()
    relay.refuse("GET", "/closing", 503, "unavailable", "the relay is closing")
    answers = iter([[], relay.answers["GET", "/closing"], [WARM]])

    def ps(_: Any) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return {"processes": answer}

    relay.on("GET", "/api/ps", ps)
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait")
    assert result.exit_code == Exit.OK, result.output
    assert "the relay is closing" in result.stderr


def test_who_stops_watching_hears_who_has_to_go_on(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    states([line()])
    relay.on("GET", "/api/launchers", {"launchers": {}})
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait", "--timeout", "0s")
    assert "keep a launcher running: edif-hpc launcher run --site hpc" in result.stdout


def test_no_replicas_are_said_so(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    states([])
    relay.refuse("GET", "/api/slots/tiny/0", 404, "not_found", "tiny has no slot 0; it wants 0 replicas")  # fmt: skip
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait")
    assert result.exit_code == Exit.REFUSED
    assert "it wants 0 replicas" in result.stderr


def test_a_site_without_a_file_here_whose_launcher_is_known(
    states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    states([WARM])
    result = run("up", "tiny", "--site", "hpc", "--gpu", "x", "--walltime", "2h", "--replicas", "3", "--wait")  # fmt: skip
    assert result.exit_code == Exit.OK, result.output
    assert "whose file is not here" in result.stdout
    expected = {"deployment": "tiny", "site": "hpc", "gpu": "x", "walltime_min": 120, "slots": 3}
    assert relay.bodies("POST", "/api/allocations") == [expected]


def test_a_site_that_nobody_knows(
    states: Callable[..., None], relay: Any, complain: Callable[..., str]
) -> None:
    states([])
    assert "there is no site 'hcp'" in complain(Exit.SETTINGS, "up", "tiny", "--site", "hcp")
    assert [each for each in relay.calls if each.method == "POST"] == []


def test_gpus_are_for_clusters(relay: Any, complain: Callable[..., str]) -> None:
    assert "--gpu: for a cluster; name it by --site" in complain(Exit.USAGE, "up", "tiny", "--gpu", "x")  # fmt: skip


def test_down_cancels_what_waits_where_no_launcher_is_heard_of(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, run: Callable[..., Any]
) -> None:
    pending = line(state="submitted", job_id="7")
    states([pending], [], before=[pending])
    relay.on("POST", "/api/drain", {"allocations": 1})
    relay.on("GET", "/api/launchers", {"launchers": {}})
    cancel = {"kind": "cancel", "allocation": "a1", "name": OURS, "job_id": "7", "reason": "x"}
    relay.on("POST", "/api/launcher/orders", {"orders": [cancel]})
    result = run("down", "tiny", "--wait")
    assert result.exit_code == Exit.OK, result.output
    assert f"cancelled {OURS}" in result.stdout


def test_what_runs_elsewhere_is_not_moved(
    slurm: FakeSlurm, states: Callable[..., None], relay: Any, complain: Callable[..., str]
) -> None:
    states([], before=[line(site="other", state="warm")])
    said = complain(Exit.REFUSED, "up", "tiny", "--site", "hpc", "--gpu", "a6000")
    assert "tiny runs at other; end it there first: edif-hpc down tiny" in said
    assert relay.bodies("POST", "/api/allocations") == []


def test_json_is_all_that_stdout_has(
    slurm: FakeSlurm, states: Callable[..., None], run: Callable[..., Any]
) -> None:
    states([WARM])
    result = run("up", "tiny", "--site", "hpc", "--gpu", "a6000", "--wait", "--json")
    assert [each["name"] for each in json.loads(result.stdout)] == [OURS]
    assert "is wanted at hpc" in result.stderr
