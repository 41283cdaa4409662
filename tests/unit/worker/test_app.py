"""What the worker's main makes of a deployment and its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edif_hpc.slurm.order import WorkerOrder
from edif_hpc.worker.app import engine_spec

ORDER = WorkerOrder(
    name="w", endpoint="tcp://127.0.0.1:1", server_key="s", public_key="p", secret_key="k", scratch="/scratch"
)  # fmt: skip


def deployment(device: str) -> dict[str, Any]:
    return {
        "model_key": "key", "more_tasks": [], "source": None, "repo_id": "org/model", "revision": None,
        "adapters": [], "dtype": "auto", "device": device, "isolation_floor": "full",
    }  # fmt: skip


def test_only_an_engine_with_a_gpu_gets_anything_of_the_workers_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/.singularity.d/libs")
    monkeypatch.setenv("LD_PRELOAD_OF_THE_SITE", "x")
    assert engine_spec(deployment("cpu"), ORDER).driver == {}
    driver = dict(engine_spec(deployment("cuda"), ORDER).driver)
    assert driver.pop("LD_LIBRARY_PATH") == "/.singularity.d/libs"
    assert all(name.endswith("_VISIBLE_DEVICES") for name in driver)
    assert engine_spec(deployment("cpu"), ORDER).scratch == Path("/scratch/engine")
