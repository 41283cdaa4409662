"""`deployment`: what is asked of the relay, and what is refused before it is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit

PATH = "/api/deployments"
ADDED = {
    "name": "tiny", "repo_id": "edif/tiny-gpt2", "revision": None, "task": "text-generation", "dtype": "float32",
    "device": "cpu", "replicas": 1, "executors": 1, "isolation_floor": "process",
    "more_tasks": [], "adapters": [],
}  # fmt: skip


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_add_says_only_what_was_said(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", PATH, ADDED)
    result = run("deployment", "add", "edif/tiny-gpt2")
    assert result.stdout == "added tiny (edif/tiny-gpt2); start it: edif-hpc up tiny\n"
    assert relay.bodies("POST", PATH) == [{"repo_id": "edif/tiny-gpt2"}]
    assert relay.calls[0].headers["authorization"].startswith("Bearer edif_")


def test_add_with_everything(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", PATH, ADDED)
    options = (
        "--name tiny --revision v1 --task text-generation --task feature-extraction --dtype bfloat16 --device cuda --replicas 2 --executors 3 --source /models/x "
        "--trust-remote-code --isolation-floor full --adapter a/lora --adapter a/other@c0ffee"
    )
    assert run("deployment", "add", "edif/tiny-gpt2", *options.split()).exit_code == Exit.OK
    assert relay.bodies("POST", PATH) == [
        {
            "repo_id": "edif/tiny-gpt2", "name": "tiny", "revision": "v1", "task": "text-generation",
            "more_tasks": ["feature-extraction"], "dtype": "bfloat16", "device": "cuda",
            "replicas": 2, "executors": 3, "source": "/models/x", "trust_remote_code": True, "isolation_floor": "full",
            "adapters": [{"repo_id": "a/lora", "revision": None}, {"repo_id": "a/other", "revision": "c0ffee"}],
        }
    ]  # fmt: skip


def test_add_a_folder(relay: Any, run: Callable[..., Any], model_folder: Path) -> None:
    relay.on("POST", PATH, ADDED)
    assert run("deployment", "add", str(model_folder)).exit_code == Exit.OK
    assert relay.bodies("POST", PATH) == [
        {"repo_id": str(model_folder), "source": str(model_folder)}
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gpt2"], "gpt2 is openai-community/gpt2"),
        (["a/b/c"], "neither ORG/NAME"),
        (["org/../etc"], "neither ORG/NAME"),
        (["org/name with space"], "neither ORG/NAME"),
        (["https://huggingface.co/a/b"], "neither ORG/NAME"),
        (["./not-here"], "holds no config.json"),
        (["a/b", "--name", "Not A Name"], "1-40 characters"),
        (["a/b", "--replicas", "-1"], "--replicas"),
        (["a/b", "--dtype", "int3"], "--dtype"),
        (["a/b", "--isolation-floor", "none"], "--isolation-floor"),
        (["a/b", "--adapter", "lora"], "neither ORG/NAME"),
        (["a/b", "--adapter", "a/*"], "neither ORG/NAME"),
        (["a/b", "--adapter", "a/lora@"], "ORG/NAME[@REVISION]"),
        ([], "MODEL"),
    ],
)
def test_clearly_wrong_input_never_reaches_the_relay(
    arguments: list[str], said: str, relay: Any, complain: Callable[..., str]
) -> None:
    assert said in complain(Exit.USAGE, "deployment", "add", *arguments)
    assert relay.calls == []


def test_a_folder_with_a_source(model_folder: Path, complain: Callable[..., str]) -> None:
    said = complain(Exit.USAGE, "deployment", "add", str(model_folder), "--source", "/x")
    assert "is a folder" in said


def test_ls(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", PATH, {"deployments": [ADDED]})
    head, row = run("deployment", "ls").stdout.splitlines()
    assert head.split()[:4] == ["NAME", "REPO", "ID", "REVISION"]
    assert row.split() == [
        "tiny",
        "edif/tiny-gpt2",
        "-",
        "text-generation",
        "float32",
        "cpu",
        "1",
        "1",
        "process",
        "-",
    ]


def test_adapters_are_shown_as_they_are_given(
    relay: Any, run: Callable[..., Any], complain: Callable[..., str]
) -> None:
    adapters = [{"repo_id": "a/lora", "revision": None}, {"repo_id": "a/x", "revision": "v1"}]
    with_adapters = ADDED | {"adapters": adapters}
    relay.on("GET", PATH, {"deployments": [with_adapters]})
    assert "a/lora, a/x@v1" in run("deployment", "ls").stdout
    assert "adapters         a/lora, a/x@v1" in run("deployment", "show", "tiny").stdout
    assert json.loads(run("deployment", "show", "tiny", "--json").stdout) == with_adapters
    assert "deployed: tiny" in complain(Exit.REFUSED, "deployment", "show", "huge")


def test_tasks_are_shown_as_they_are_given(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", PATH, {"deployments": [ADDED | {"more_tasks": ["feature-extraction"]}]})
    assert "text-generation, feature-extraction  float32" in run("deployment", "ls").stdout
    shown = run("deployment", "show", "tiny").stdout
    assert "task             text-generation, feature-extraction\n" in shown
    assert "more tasks" not in shown


def test_one_task_is_asked_for_as_one(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", PATH, ADDED)
    run("deployment", "add", "edif/tiny-gpt2", "--task", "fill-mask")
    assert relay.bodies("POST", PATH) == [{"repo_id": "edif/tiny-gpt2", "task": "fill-mask"}]


def test_ls_of_nothing_says_what_to_do(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", PATH, {"deployments": []})
    assert "edif-hpc deployment add" in run("deployment", "ls").stdout
    assert run("deployment", "ls", "--json").stdout == "[]\n"


def test_rm(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("DELETE", f"{PATH}/tiny", {"ended_requests": 2})
    assert "2 request(s) ended" in run("deployment", "rm", "tiny", "--force").stdout
    assert relay.calls[0].query == "force=true"


def test_a_name_is_one_part_of_the_path(relay: Any, complain: Callable[..., str]) -> None:
    complain(Exit.REFUSED, "deployment", "rm", "../tokens")
    assert relay.calls[0].path == f"{PATH}/..%2Ftokens"


def test_limits_are_set_when_it_is_added(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", PATH, ADDED)
    run("deployment", "add", "edif/tiny-gpt2", "--max-wall", "2h", "--max-saved", "5")
    assert relay.bodies("POST", PATH) == [
        {"repo_id": "edif/tiny-gpt2", "limits": {"wall_s": 7200.0, "saved_tensors": 5}}
    ]


def test_limits_are_changed_and_shown(relay: Any, run: Callable[..., Any]) -> None:
    limited = ADDED | {"limits": {"scratch_bytes": 512 << 20, "wall_s": None}}
    relay.on("POST", f"{PATH}/tiny/limits", limited)
    relay.on("GET", PATH, {"deployments": [limited]})
    result = run("deployment", "set", "tiny", "--max-scratch", "512MiB", "--max-wall", "none")
    assert result.stdout == "limits of tiny: scratch 512 MiB\n"
    body = {"scratch_bytes": 512 << 20, "wall_s": None}
    assert relay.bodies("POST", f"{PATH}/tiny/limits") == [body]
    shown = run("deployment", "show", "tiny").stdout
    assert "scratch 512 MiB" in shown


def test_the_way_of_weights_is_sent(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("POST", PATH, ADDED)
    run("deployment", "add", "edif/tiny-gpt2", "--device", "cuda", "--weights", "shared")
    assert relay.bodies("POST", PATH) == [
        {"repo_id": "edif/tiny-gpt2", "device": "cuda", "weights": "shared"}
    ]
