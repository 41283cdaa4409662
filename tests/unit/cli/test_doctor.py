"""`doctor`: one finding for one broken thing, with the way out."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit

SERVED = {
    "tiny/0": {"application_state": "RUNNING", "repo_id": "edif/tiny-gpt2", "isolation": "full"},
    "cold": {"application_state": "NOT_STARTED", "repo_id": "org/cold"},
}


@pytest.fixture
def healthy(relay: Any) -> Any:
    version = importlib.metadata.version("edif-hpc")
    relay.send("GET", "/ping", b"pong", headers={"edif-version": version})
    relay.on("GET", "/whoami", {"email": "ada", "tags": ["operator"]})
    relay.on("GET", "/status", {"deployments": SERVED})
    return relay


@pytest.fixture
def findings(run: Callable[..., Any]) -> Callable[..., Any]:
    def call(code: int, *arguments: str, **more: str) -> dict[str, Any]:
        result = run(*arguments, "doctor", "--json", **more)
        assert result.exit_code == code, result.output
        return {each["what"]: each for each in json.loads(result.stdout)}

    return call


def test_all_is_well(healthy: Any, findings: Callable[..., Any]) -> None:
    found = findings(Exit.OK)
    for what in (
        "python",
        "settings file",
        "relay",
        "relay's version",
        "clock",
        "token",
        "deployment tiny/0",
    ):
        assert found[what]["grade"] == "OK", found[what]
    assert "ada, operator" in found["token"]["seen"]
    assert found["isolation"]["grade"] in {"OK", "WARN"}


def test_what_an_extra_needs_is_not_of_the_core(
    healthy: Any, findings: Callable[..., Any]
) -> None:
    found = findings(Exit.OK)
    (core,) = [each["seen"] for what, each in found.items() if what.startswith("edif-hpc ")]
    assert "click" in core
    assert not {"s3fs", "peft", "torch"} & set(core.replace(",", " ").split())
    assert {"extra [s3]", "extra [adapters]", "extra [worker]"} <= found.keys()


def test_a_cold_deployment_is_a_warning(healthy: Any, findings: Callable[..., Any]) -> None:
    cold = findings(Exit.OK)["deployment cold"]
    assert (cold["grade"], cold["way_out"]) == ("WARN", "edif-hpc up cold")


def test_lines_for_people(healthy: Any, run: Callable[..., Any]) -> None:
    lines = run("doctor").stdout.splitlines()
    assert all(line.split()[0] in {"OK", "WARN", "FAIL"} for line in lines)
    assert "WARN  deployment cold: org/cold has no worker; edif-hpc up cold" in lines


def test_a_token_that_is_refused(healthy: Any, findings: Callable[..., Any]) -> None:
    healthy.refuse("GET", "/whoami", 401, "not_authenticated", "the API key was revoked")
    token = findings(Exit.FAILED)["token"]
    assert (token["grade"], token["seen"]) == ("FAIL", "the API key was revoked")


def test_no_token(healthy: Any, findings: Callable[..., Any]) -> None:
    assert findings(Exit.FAILED, EDIF_TOKEN="")["token"]["grade"] == "FAIL"


def test_no_relay_is_one_finding(findings: Callable[..., Any]) -> None:
    found = findings(Exit.FAILED, "--relay", "http://127.0.0.1:9")
    assert found["relay"]["grade"] == "FAIL"
    assert {"token", "clock", "deployments"}.isdisjoint(found)


def test_a_settings_file_that_others_can_read(
    healthy: Any, findings: Callable[..., Any], environ: dict[str, str]
) -> None:
    Path(environ["EDIF_CONFIG"]).chmod(0o644)
    file = findings(Exit.FAILED)["settings file"]
    assert file["way_out"] == f"chmod 600 {environ['EDIF_CONFIG']}"


@pytest.mark.parametrize(
    ("headers", "way_out"),
    [({"edif-version": "9.9"}, "pip install edif-hpc==9.9"), ({}, "it is older than this")],
)
def test_a_relay_of_another_version(
    healthy: Any, findings: Callable[..., Any], headers: dict[str, str], way_out: str
) -> None:
    healthy.send("GET", "/ping", b"pong", headers=headers)
    version = findings(Exit.OK)["relay's version"]
    assert version["grade"] == "WARN"
    assert version["way_out"].startswith(way_out)


def test_a_wrong_clock(healthy: Any, findings: Callable[..., Any]) -> None:
    healthy.send("GET", "/ping", b"pong", headers={"date": formatdate(0, usegmt=True)})
    assert findings(Exit.OK)["clock"]["grade"] == "WARN"


def test_the_relays_folder_on_this_machine(
    healthy: Any, run: Callable[..., Any], findings: Callable[..., Any], environ: dict[str, str]
) -> None:
    assert "disk" not in findings(Exit.OK)
    assert run("relay", "init").exit_code == Exit.OK
    assert findings(Exit.OK)["disk"]["grade"] in {"OK", "WARN"}
    Path(environ["EDIF_RELAY_DATA_DIR"]).chmod(0o755)
    assert findings(Exit.FAILED)["data directory"]["grade"] == "FAIL"
