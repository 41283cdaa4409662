"""Stacks for the acceptance tests: real processes, one stack for as many tests as its state allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.stack import MODEL, Stack

#: Leases short enough to see them expire, long enough for a machine that does other work too.
QUICK = {"lease_s": 10.0, "heartbeat_s": 0.5, "ws_grace_s": 2.0, "poll_hold_s": 0.2}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Iterator[Stack]:
    """A relay and one warm worker with the real engine, launched as `edif-hpc up` does."""
    root = tmp_path_factory.mktemp("stack")
    with Stack(root=root, models={MODEL: tiny_gpt2}, settings=QUICK) as running:
        running.deploy()
        running.launch(submitit=True)
        running.wait_warm()
        yield running


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[ClientProcess]:
    """A Python process with the unmodified nnsight client and the model, remote and local."""
    with ClientProcess(stack.client_environ(stack.token("ada")), stack.root / "ada") as process:
        process.run(f"from nnsight import LanguageModel; model = LanguageModel({MODEL!r})")
        yield process


@pytest.fixture(scope="module")
def noop_stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A relay without workers, for workers without a model."""
    with Stack(root=tmp_path_factory.mktemp("noop"), settings=QUICK) as running:
        running.deploy()
        yield running
