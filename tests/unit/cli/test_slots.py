"""`explain` and `logs`: a slot in words, and what was said in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit

FIRST, SECOND = "edif-my-tiny-0-1-0000000a", "edif-my-tiny-0-2-0000000b"
SITE = 'name = "hpc"\nscheduler = "slurm"\nstate_dir = "{root}/state"\n[gpus.x]\npartition = "x"\ngres = "gpu"\nvendor = "none"\nmax_walltime_min = 5\ncpus = 1\nmem_gb = 1\n'


def generation(number: int, name: str, **facts: Any) -> dict[str, Any]:
    return {
        "name": name, "generation": number, "state": "warm", "job_id": str(16 + number), "node": "n1", "walltime_min": 60,
        "left_s": 1800.0, "submitted_at": 1.7e9 + number, "started_at": 1.7e9, "warm_at": 1.7e9, "ended_at": None, "cause": None,
        "detail": "", "reason": "", "advice": "", **facts,
    }  # fmt: skip


ENDED = generation(1, FIRST, state="ended", ended_at=1.7e9 + 3600, cause="walltime", detail="bye")
CRASHED = generation(1, FIRST, ended_at=1.7e9 + 9, warm_at=None, cause="crashed", detail="a\nno such model")  # fmt: skip
PENDING = generation(
    2, SECOND, state="submitted", node=None, left_s=None, started_at=None, warm_at=None, reason="PartitionTimeLimit", advice="ask for less",
)  # fmt: skip


@pytest.fixture
def slot(relay: Any) -> Callable[..., None]:
    """A relay with one slot of `my-tiny`."""
    relay.on("GET", "/api/deployments", {"deployments": [{"name": "my-tiny", "repo_id": "edif/my-tiny", "replicas": 1}]})  # fmt: skip
    relay.on("GET", "/api/ps", {"processes": []})

    def show(**facts: Any) -> None:
        plain = {
            "deployment": "my-tiny", "slot": 0, "site": "hpc", "up": True, "paused": False, "why": "serves", "advice": "",
            "gap_s": 0.0, "expected": {"wait_s": 600.0, "warmup_s": 180.0, "request_s": 60.0, "lead_s": 960.0},
            "launcher": {"name": "login1-1000", "silent_s": 4.0}, "excluded_nodes": [], "generations": [ENDED, PENDING],
        }  # fmt: skip
        relay.on("GET", "/api/slots/my-tiny/0", plain | facts)

    return show


@pytest.mark.parametrize("target", ["my-tiny", "my-tiny/0", "edif/my-tiny"])
def test_a_slot_in_words(target: str, slot: Callable[..., None], run: Callable[..., Any]) -> None:
    slot(advice="3 replicas would hide it", gap_s=300.0, excluded_nodes=["n7"])
    said = run("explain", target).stdout.splitlines()
    assert said[0] == "my-tiny/0: serves"
    assert "  advice: 3 replicas would hide it" in said
    assert "  a gap of 5 min is to be expected at each end of a walltime" in said
    assert "  expected at hpc: 10 min in the queue, 3 min to load; a successor is ordered 16 min before an end" in said  # fmt: skip
    assert "  launcher: login1-1000, heard 4 s ago" in said
    assert "  nodes left out: n7" in said
    assert any("generation 1, job 17 on n1: ended" in each and "(walltime), was warm for 60 min" in each for each in said)  # fmt: skip
    assert "  generation 2, job 18: submitted (PartitionTimeLimit)" in said
    assert "    ask for less" in said


def test_a_death_before_it_was_warm_has_its_last_words(
    slot: Callable[..., None], run: Callable[..., Any]
) -> None:
    slot(generations=[CRASHED])
    assert "    no such model" in run("explain", "my-tiny").stdout.splitlines()


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        (None, "none was heard of since the relay began; edif-hpc launcher run --site hpc"),
        ({"name": "l", "silent_s": 3600.0}, "l, heard 60 min ago: start it again"),
    ],
)
def test_a_launcher_that_is_not_there(
    launcher: Any, said: str, slot: Callable[..., None], run: Callable[..., Any]
) -> None:
    slot(launcher=launcher)
    assert f"  launcher: {said}" in run("explain", "my-tiny").stdout


def test_explain_as_json(slot: Callable[..., None], run: Callable[..., Any]) -> None:
    slot()
    [told] = json.loads(run("explain", "my-tiny/0", "--json").stdout)
    assert told["expected"]["lead_s"] == 960.0


def test_nothing_of_that_name(slot: Callable[..., None], complain: Callable[..., str]) -> None:
    slot()
    assert "deployed: my-tiny" in complain(Exit.REFUSED, "explain", "tiny")
    assert "see: edif-hpc ps" in complain(Exit.REFUSED, "logs", "edif-my-tiny-0-1-ffffffff")
    assert "see: edif-hpc ps" in complain(Exit.REFUSED, "logs", "nothing")


def test_a_deployment_that_was_never_up(
    slot: Callable[..., None], relay: Any, complain: Callable[..., str]
) -> None:
    relay.refuse("GET", "/api/slots/my-tiny/0", 404, "not_found", "no slot 0")
    assert "bring it up: edif-hpc up my-tiny" in complain(Exit.REFUSED, "explain", "my-tiny")


@pytest.fixture
def folder(environ: dict[str, str], tmp_path: Path) -> Path:
    """The folder of the first generation at the site `hpc`, which has a file here."""
    sites = Path(environ["EDIF_CONFIG"]).parent / "sites"
    sites.mkdir()
    (sites / "hpc.toml").write_text(SITE.format(root=tmp_path))
    folder = tmp_path / "state" / FIRST
    folder.mkdir(parents=True)
    (folder / "17_0_log.out").write_text("".join(f"line {number}\n" for number in range(100)))
    return folder


@pytest.mark.parametrize("target", ["my-tiny", FIRST])
def test_the_log_of_what_begun_last(
    target: str, folder: Path, slot: Callable[..., None], run: Callable[..., Any]
) -> None:
    slot()
    result = run("logs", target, "-n", "2")
    assert result.stdout.splitlines() == ["line 98", "line 99"]
    assert result.stderr.strip() == f"{FIRST}: {folder / '17_0_log.out'}"


def test_the_last_words_where_the_folder_is_not_seen(
    slot: Callable[..., None], run: Callable[..., Any]
) -> None:
    slot(generations=[CRASHED])
    told = json.loads(run("logs", "my-tiny", "--json").stdout)
    assert told == {
        "name": FIRST,
        "site": "hpc",
        "log": None,
        "lines": ["a", "no such model"],
        "read": 0,
    }


def test_nothing_is_known_of_what_lives_elsewhere(
    slot: Callable[..., None], complain: Callable[..., str]
) -> None:
    slot(generations=[generation(1, FIRST)])
    assert "is not seen from here" in complain(Exit.REFUSED, "logs", "my-tiny")


def test_what_cannot_be_followed(slot: Callable[..., None], run: Callable[..., Any]) -> None:
    slot(generations=[CRASHED])
    result = run("logs", "my-tiny", "-f")
    assert result.exit_code == Exit.REFUSED
    assert "cannot be followed" in result.stderr
