"""`edif-hpc env`: what a request finds, in words, and how this Python differs from it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable
from typing import Any

import pytest

from edif_hpc.cli.exits import Exit
from edif_hpc.domain.levels import Level, told

HERE = {
    name: importlib.metadata.version(name)
    for name in ("torch", "transformers", "nnsight", "tokenizers", "numpy", "peft")
}
TINY: dict[str, Any] = {
    "name": "tiny", "repo_id": "edif/tiny-gpt2", "revision": None, "dtype": "float32", "tasks": ["text-generation"],
    "adapters": ["lab/lora"], "attention": ["eager", "sdpa"], "workers": 1, "isolation": "no-namespaces",
    "isolation_floor": "process", "rules": told(Level.NO_NAMESPACES), "commit": "c0ffee", "device": "cpu",
    "unverified": False, "attn_implementation": "sdpa", "python_version": f"{platform.python_version()} (main)",
    "packages": HERE | {"pandas": "3.1.1", "zstandard": "0.25.0"}, "stores": ["/data/sets"], "libraries": [],
    "limits": {"wall_s": {"value": 60.0, "set_by": "the token ada"}, "memory_bytes": {"value": 1 << 30, "set_by": None}},
}  # fmt: skip


@pytest.fixture
def env(relay: Any, run: Callable[..., Any]) -> Callable[..., str]:
    """Run it with what the relay tells of a deployment that differs in some facts."""

    def call(*arguments: str, **facts: Any) -> str:
        relay.on("GET", "/api/env", {"deployments": [TINY | facts]})
        result = run("env", *arguments)
        assert result.exit_code == 0, result.output
        text: str = result.stdout
        return text

    return call


def test_what_is_there_and_what_is_allowed(env: Callable[..., str]) -> None:
    lines = env().splitlines()
    assert lines[0] == "tiny: edif/tiny-gpt2, float32 on cpu, isolation no-namespaces"
    assert f"  torch {HERE['torch']}, transformers {HERE['transformers']}" in "\n".join(lines)
    assert "  not there: einops, sklearn, scipy, datasets, accelerate, safetensors" in lines
    assert "  1 more: edif-hpc env tiny --packages" in lines
    assert "  stores (read-only): /data/sets" in lines
    assert "  libraries (after the image's own): none" in lines
    assert "  adapters: lab/lora" in lines
    assert "    wall_s             60 s, set by the token ada" in lines
    assert "    memory_bytes       1 GiB" in lines
    assert "    + start threads" in lines
    assert any(each.startswith("    - start processes (subprocess") for each in lines)


def test_all_packages(env: Callable[..., str]) -> None:
    assert "  zstandard 0.25.0" in env("--packages").splitlines()


def test_what_is_open_is_marked(env: Callable[..., str]) -> None:
    told_open = env(isolation="process", rules=told(Level.PROCESS))
    assert "    ? use the network" in told_open


def test_without_a_worker(env: Callable[..., str]) -> None:
    assert env(workers=0).splitlines() == [
        "tiny: edif/tiny-gpt2, float32",
        "  no worker is warm, so nothing is known of where it will run",
    ]


def test_the_same_versions(env: Callable[..., str]) -> None:
    there = TINY["packages"] | {"torch": HERE["torch"].partition("+")[0] + "+cu126"}
    text = env("--compare", packages=there)
    assert "WARN" not in text
    assert "this Python has the same versions of torch, transformers" in text


def test_other_versions_are_warned_of(env: Callable[..., str]) -> None:
    text = env("--compare", packages=TINY["packages"] | {"torch": "2.0.0"}, python_version="3.9.1")
    assert f"  WARN  torch is {HERE['torch']} here and 2.0.0 there: numbers may differ" in text
    assert f"  WARN  python is {platform.python_version()} here and 3.9.1 there" in text


def test_as_json(env: Callable[..., str]) -> None:
    assert json.loads(env("--json")) == [TINY]
    [compared] = json.loads(env("--json", "--compare", packages={"torch": "2.0.0"}))
    assert compared["differences"] == {"torch": {"here": HERE["torch"], "there": "2.0.0"}}
    assert compared["not_here"] == []


def test_by_name_or_model(env: Callable[..., str], complain: Callable[..., str]) -> None:
    assert env("tiny") == env("edif/tiny-gpt2") == env()
    assert "there are: tiny" in complain(Exit.REFUSED, "env", "gpt2")


def test_nothing_is_deployed(relay: Any, run: Callable[..., Any]) -> None:
    relay.on("GET", "/api/env", {"deployments": []})
    assert run("env").stdout == "nothing is deployed\n"
