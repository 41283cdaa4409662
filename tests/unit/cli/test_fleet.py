"""`up`, `down`, `ps`: what they ask of the relay, start on this machine, and say while they wait."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.allocations.local import LocalSite
from edif_hpc.cli.allocations.up_here import local_site
from edif_hpc.cli.allocations.words import rows
from edif_hpc.cli.api import Api
from edif_hpc.cli.context import Context
from edif_hpc.cli.exits import Exit
from edif_hpc.errors import LaunchError
from edif_hpc.settings import ClientSettings
from edif_hpc.slurm.order import EngineFacts, read_pilot_order
from edif_hpc.slurm.submit import Submission

DEPLOYMENTS = {"deployments": [{"name": "tiny", "repo_id": "edif/tiny-gpt2"}]}
WARM = {
    "state": "warm", "progress": None, "isolation": "full", "executors": 1, "leases": 2, "running": 1,
}  # fmt: skip


def line(**facts: Any) -> dict[str, Any]:
    """A line of `ps`."""
    return {
        "allocation": "a1", "name": "edif-tiny-0-1-a1", "deployment": "tiny", "slot": 0, "generation": 1, "site": "local",
        "job_id": str(os.getpid()), "node": os.uname().nodename, "state": "loading", "detail": "", "submitted_at": 1.7e9,
        "warm_at": None, "worker": None, **facts,
    }  # fmt: skip


def made(number: int) -> dict[str, Any]:
    """A new allocation, as the relay tells it."""
    return {
        "allocation": {"id": f"a{number}"},
        "name": f"edif-tiny-{number}-1-a{number}",
        "join_token": "once",
    }


def changing(relay: Any, *states: list[dict[str, Any]]) -> None:
    """`ps` shows these one after the other, and the last for ever."""
    left = list(states)
    relay.on("GET", "/api/ps", lambda _: {"processes": left.pop(0) if len(left) > 1 else left[0]})


@dataclass
class FakeSubmitter:
    """A scheduler that takes everything, or fails from some submission on."""

    fails_from: int = 99
    error: BaseException = field(default_factory=lambda: LaunchError("no room"))
    taken: list[Submission] = field(default_factory=list)

    def submit(self, submission: Submission) -> str:
        if len(self.taken) >= self.fails_from:
            raise self.error
        self.taken.append(submission)
        return f"job{len(self.taken)}"


@pytest.fixture
def api(relay: Any) -> Api:
    for number in range(3):
        relay.on("POST", f"/api/allocations/a{number}/submitted", {})
        relay.on("POST", f"/api/allocations/a{number}/failed", {})
    return Api(ClientSettings(relay=relay.url, token="edif_a_b"))


def test_an_order_is_for_its_owner_alone(api: Api, relay: Any, tmp_path: Path) -> None:
    submitter = FakeSubmitter()
    engine = EngineFacts(hub_token="hf_x", threads=3)
    LocalSite(folder=tmp_path / "local", engine=engine, submitter=submitter).launch(api, [made(0)])
    [submission] = submitter.taken
    assert stat.S_IMODE(submission.order.stat().st_mode) == 0o600
    assert stat.S_IMODE(submission.folder.stat().st_mode) == 0o700
    order = read_pilot_order(submission.order)
    assert (order.name, order.relay_url, order.join_token) == (
        "edif-tiny-0-1-a0",
        relay.url,
        "once",
    )
    assert order.engine == engine
    assert relay.bodies("POST", "/api/allocations/a0/submitted") == [{"job_id": "job1"}]


def test_stores_and_libraries_of_this_machine(
    environ: dict[str, str], relay: Any, complain: Callable[..., str], tmp_path: Path
) -> None:
    """They reach the engine; what holds our own files is no store."""
    ctx = Context(environ=environ, config=Path(environ["EDIF_CONFIG"]))
    store = tmp_path / "data"
    store.mkdir()
    engine = local_site(ctx, {"stores": (store,), "libraries": (store,)}).engine
    assert (engine.stores, engine.libraries) == ((str(store),), (str(store),))
    assert local_site(ctx, {}).engine.readable == ()
    for option in ("--store", "--library"):
        said = complain(Exit.REFUSED, "up", "tiny", option, str(tmp_path))
        assert "every request may read there then" in said
    assert not relay.calls


@pytest.mark.parametrize(
    "error", [LaunchError("no room"), OSError("disk full"), KeyboardInterrupt("stop")]
)
def test_what_was_not_submitted_is_told_to_the_relay(
    error: BaseException, api: Api, relay: Any, tmp_path: Path
) -> None:
    site = LocalSite(folder=tmp_path / "local", submitter=FakeSubmitter(fails_from=1, error=error))
    with pytest.raises(type(error)):
        site.launch(api, [made(0), made(1), made(2)])
    told = [each.path.removeprefix("/api/allocations/") for each in relay.calls]
    assert told == ["a0/submitted", "a1/failed", "a2/failed"]
    assert relay.calls[-1].body == {"cause": "launch failed", "detail": str(error)}


def test_a_folder_that_others_may_write_is_refused(api: Api, relay: Any, tmp_path: Path) -> None:
    (tmp_path / "local").mkdir()
    (tmp_path / "local").chmod(0o777)
    with pytest.raises(LaunchError, match="chmod 700"):
        LocalSite(folder=tmp_path / "local", submitter=FakeSubmitter()).launch(api, [made(0)])
    assert [each.path for each in relay.calls] == ["/api/allocations/a0/failed"]


def test_up_adds_a_model_that_is_not_deployed(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", "/api/deployments", DEPLOYMENTS)
    relay.on("POST", "/api/deployments", {"name": "new", "repo_id": "org/new"})
    relay.on("POST", "/api/allocations", {"allocations": []})
    changing(relay, [])
    assert "added the deployment new of org/new" in run("up", "org/new").stdout
    assert relay.bodies("POST", "/api/allocations") == [{"deployment": "new", "site": "local"}]


def test_up_knows_a_model_that_is_deployed(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", "/api/deployments", DEPLOYMENTS)
    relay.on("POST", "/api/allocations", {"allocations": []})
    changing(relay, [])
    run("up", "Edif/Tiny-GPT2")
    assert relay.bodies("POST", "/api/allocations") == [{"deployment": "tiny", "site": "local"}]


def test_up_waits_until_it_is_warm(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/allocations", {"allocations": []})
    loading = {"state": "loading", "progress": 0.4}
    changing(
        relay,
        [line()],
        [line(detail="fetching", worker=loading)],
        [line(state="warm", detail="serves", worker=WARM)],
    )
    result = run("up", "tiny", "--wait")
    assert result.exit_code == Exit.OK
    assert result.stderr.splitlines()[-2:] == ["tiny/0: fetching 40%", "tiny/0: serves"]


def test_up_shows_the_last_words_of_what_died(
    relay: Any, run: Callable[..., Any], environ: dict[str, str]
) -> None:
    folder = Path(environ["EDIF_STATE_DIR"], line()["name"])
    folder.mkdir(parents=True)
    (folder / "7_0_log.out").write_text("loading\nOSError: no such model\n")
    relay.on("POST", "/api/allocations", {"allocations": []})
    changing(relay, [line()], [line()], [])
    result = run("up", "tiny", "--wait")
    assert result.exit_code == Exit.FAILED
    assert "  OSError: no such model" in result.stderr.splitlines()
    assert f"its log: {folder / '7_0_log.out'}" in result.stderr


def test_up_notices_a_pilot_that_died_unheard(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/allocations", {"allocations": []})
    relay.on("POST", "/api/allocations/a1/failed", {})
    changing(relay, [line()], [line(state="submitted", node=None, job_id="99999999")])
    assert run("up", "tiny", "--wait").exit_code == Exit.FAILED
    [told] = relay.bodies("POST", "/api/allocations/a1/failed")
    assert told["cause"] == "the pilot died"


DEAD = {"job_id": "99999999"}


@pytest.mark.parametrize(
    ("facts", "buried"),
    [
        (DEAD, True),
        (DEAD | {"node": None, "state": "submitted"}, True),
        (DEAD | {"worker": WARM}, False),  # its worker is connected: it outlived its pilot
        (DEAD | {"node": "elsewhere"}, False),
        (DEAD | {"site": "hpc"}, False),
        (DEAD | {"deployment": "another"}, False),
        ({}, False),  # its pilot, said to be this very process, lives
        ({"job_id": None}, False),  # it is being submitted at this moment
    ],
)
def test_up_buries_what_died_unheard_so_that_its_slot_is_free(
    facts: dict[str, Any], buried: bool, relay: Any, run: Callable[..., Any]
) -> None:
    relay.on("POST", "/api/allocations", {"allocations": []})
    relay.on("POST", "/api/allocations/a1/failed", {})
    changing(relay, [line(**facts)])
    assert run("up", "tiny", "--no-wait").exit_code == Exit.OK
    posts = [each.path for each in relay.calls if each.method == "POST"]
    expected = ["/api/allocations/a1/failed"] if buried else []
    assert posts == [*expected, "/api/allocations"], "first buried, then asked for"


def test_up_does_not_wait_for_ever(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", "/api/allocations", {"allocations": []})
    changing(relay, [line()])
    result = run("up", "tiny", "--wait", "--timeout", "0s")
    assert result.exit_code == Exit.FAILED
    assert "it goes on, see: edif-hpc ps" in result.stderr


def test_down_waits_until_they_are_gone(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", "/api/deployments", DEPLOYMENTS)
    relay.on("POST", "/api/drain", {"allocations": 1})
    warm = line(job_id="99999999", worker=WARM)
    changing(relay, [warm], [warm], [])
    result = run("down", "tiny", "--wait")
    assert result.stdout.splitlines() == ["1 allocation(s) drain", "gone"]
    assert relay.bodies("POST", "/api/drain") == [{"deployment": "tiny"}]
    assert "runs 1 request(s)" in result.stderr


def test_down_counts_a_process_of_this_machine_that_lives(
    relay: Any, run: Callable[..., Any]
) -> None:
    relay.on("POST", "/api/drain", {"allocations": 1})
    changing(relay, [line()], [])  # its pilot, said to be this very process, goes on
    result = run("down", "--all", "--wait", "--timeout", "0s")
    assert result.exit_code == Exit.FAILED
    assert f"(job {os.getpid()})" in result.stderr


def test_down_names_a_deployment_that_does_not_exist(
    relay: Any, complain: Callable[..., str]
) -> None:
    relay.on("GET", "/api/deployments", DEPLOYMENTS)
    changing(relay, [line()])
    assert "deployed: tiny" in complain(Exit.REFUSED, "down", "tiyn")


@pytest.mark.parametrize("arguments", [[], ["tiny", "--all"]])
def test_down_wants_one_or_all(arguments: list[str], complain: Callable[..., str]) -> None:
    assert "name a deployment, or give --all" in complain(Exit.USAGE, "down", *arguments)


def test_down_takes_several_and_models(relay: Any, run: Callable[..., Any]) -> None:
    both = {"deployments": [*DEPLOYMENTS["deployments"], {"name": "big", "repo_id": "org/big"}]}
    relay.on("GET", "/api/deployments", both)
    relay.on("POST", "/api/drain", {"allocations": 1})
    changing(relay, [])
    assert run("down", "tiny", "Org/Big").stdout == "2 allocation(s) drain\n"
    assert relay.bodies("POST", "/api/drain") == [{"deployment": "tiny"}, {"deployment": "big"}]


HERE = line(allocation="a1", name="edif-tiny-0-1-a1", node="n1.cluster", site="hpc")
THERE = line(allocation="a2", name="edif-tiny-1-1-a2", node="n2.cluster", site="hpc", slot=1)


@pytest.mark.parametrize(
    ("arguments", "drained"),
    [
        (["edif-tiny-1-1-a2"], ["a2"]),
        (["tiny"], ["a1", "a2"]),
        (["--node", "n1"], ["a1"]),
        (["--node", "n2.cluster"], ["a2"]),
    ],
)
def test_drain(
    arguments: list[str], drained: list[str], relay: Any, run: Callable[..., Any]
) -> None:
    relay.on("POST", "/api/drain", {"allocations": 1})
    changing(relay, [HERE, THERE])
    result = run("drain", *arguments, "--json")
    assert len(json.loads(result.stdout)) == len(drained)
    asked = relay.bodies("POST", "/api/drain")
    assert asked == [{"allocation": each} for each in drained], (
        "never as a whole: that would end it"
    )


def test_drain_names_what_there_is(relay: Any, complain: Callable[..., str]) -> None:
    relay.on("GET", "/api/deployments", DEPLOYMENTS)
    changing(relay, [HERE, THERE])
    assert "there is: n1.cluster, n2.cluster" in complain(Exit.REFUSED, "drain", "--node", "n3")
    assert "deployed: tiny" in complain(Exit.REFUSED, "drain", "edif-tiny-0-9-aa")
    assert "or give --node" in complain(Exit.USAGE, "drain")


def scaled(relay: Any, *lines: dict[str, Any]) -> None:
    relay.on("GET", "/api/deployments", {"deployments": [DEPLOYMENTS["deployments"][0] | {"replicas": 2}]})  # fmt: skip
    relay.on("POST", "/api/deployments/tiny/replicas", {})
    relay.on("POST", "/api/allocations", {"allocations": []})
    changing(relay, list(lines))


@pytest.mark.parametrize(("site", "count", "starts"), [("hpc", 3, 0), ("local", 3, 1), ("local", 1, 0)])  # fmt: skip
def test_scale(site: str, count: int, starts: int, relay: Any, run: Callable[..., Any]) -> None:
    scaled(relay, line(site=site))
    assert run("scale", "edif/tiny-gpt2", str(count)).exit_code == Exit.OK
    assert relay.bodies("POST", "/api/deployments/tiny/replicas") == [{"replicas": count}]
    assert len(relay.bodies("POST", "/api/allocations")) == starts


def test_scale_starts_nothing_of_what_is_not_up(relay: Any, run: Callable[..., Any]) -> None:
    scaled(relay)
    run("scale", "tiny", "5")
    assert relay.bodies("POST", "/api/allocations") == []


def test_ps(relay: Any, run: Callable[..., Any]) -> None:
    changing(relay, [line(state="warm", detail="serves", worker=WARM)])
    row = run("ps").stdout.splitlines()[1].split()
    assert row[:2] == ["tiny/0", "1"]
    assert row[4:8] == ["warm", "serves", "full", "2"]


def test_a_site_file_of_this_machine(
    relay: Any, run: Callable[..., Any], environ: dict[str, str], tmp_path: Path
) -> None:
    sites = Path(environ["EDIF_CONFIG"]).parent / "sites"
    sites.mkdir()
    facts = f'name = "desk"\nscheduler = "local"\nstate_dir = "{tmp_path / "desk"}"\n'
    (sites / "desk.toml").write_text(facts)
    relay.on("POST", "/api/allocations", {"allocations": []})
    changing(relay, [line()])
    assert run("up", "tiny", "--site", "desk", "--replicas", "2", "--no-wait").exit_code == Exit.OK
    [asked] = relay.bodies("POST", "/api/allocations")
    assert asked == {"deployment": "tiny", "site": "local", "slots": 2}
    log = tmp_path / "desk" / line()["name"] / "7_0_log.out"
    log.parent.mkdir(parents=True)
    log.touch()
    assert [each["log"] for each in json.loads(run("ps", "--json").stdout)] == [str(log)]


def test_ps_of_a_cluster(relay: Any, run: Callable[..., Any]) -> None:
    serves = line(
        site="hpc", state="warm", detail="serves", worker=WARM, job_id="17", node="n1", left_s=7260.0,
        successor="edif-tiny-0-2-b", successor_due_s=None,
    )  # fmt: skip
    follows = line(
        name="edif-tiny-0-2-b", generation=2, site="hpc", state="submitted", job_id="18", node=None, detail="Priority",
        reason="Priority", start_in_s=5400.0,
    )  # fmt: skip
    alone = line(name="x", slot=1, site="hpc", state="warm", worker=WARM, left_s=9000.0, successor=None, successor_due_s=7300.0)  # fmt: skip
    ordered = line(name="y", slot=2, site="hpc", state="ordered", job_id=None, node=None, order_holder=None)  # fmt: skip
    changing(relay, [serves, follows, alone, ordered])
    shown = run("ps").stdout.splitlines()
    assert shown[1].endswith("2 h   submitted (Priority), may start in 90 min")
    assert "submitted  (Priority), may start in 90 min" in shown[2]
    assert shown[3].endswith("ordered in 2 h")
    assert "ordered    waits for a launcher" in shown[4]


def test_ps_json_has_the_path_of_the_log(
    relay: Any, run: Callable[..., Any], environ: dict[str, str]
) -> None:
    log = Path(environ["EDIF_STATE_DIR"], line()["name"], "7_0_log.out")
    log.parent.mkdir(parents=True)
    log.touch()
    changing(relay, [line(), line(name="elsewhere")])
    assert [each["log"] for each in json.loads(run("ps", "--json").stdout)] == [str(log), None]


@pytest.mark.parametrize(
    ("told", "shown"),
    [
        ({"unverified": True}, "full, unverified"),
        ({"unverified": True, "weights": "shared"}, "full, shared, unverified"),
        ({"unverified": False, "weights": "private"}, "full, private"),
        ({"unverified": False, "weights": "mapped"}, "full"),
    ],
)
def test_isolation_on_a_device_where_it_was_not_tried_is_shown_as_such(
    told: dict[str, Any], shown: str
) -> None:
    [row] = rows([line(state="running", worker=WARM | told)])
    assert row["isolation"] == shown
