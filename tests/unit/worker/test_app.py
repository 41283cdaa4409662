"""What the worker's main makes of a deployment and its order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edif_hpc.slurm.order import EngineFacts, WorkerOrder
from edif_hpc.worker.app import engine_spec

ORDER = WorkerOrder(
    name="w", endpoint="tcp://127.0.0.1:1", server_key="s", public_key="p", secret_key="k", scratch="/scratch"
)  # fmt: skip


def deployment(device: str) -> dict[str, Any]:
    return {
        "model_key": "key", "more_tasks": [], "source": None, "repo_id": "org/model", "revision": None,
        "adapters": [], "dtype": "auto", "device": device, "weights": "auto", "gpus": 2, "isolation_floor": "full",
        "scratch_bytes": 5 << 20,
    }  # fmt: skip


def test_what_the_site_lets_requests_read_reaches_the_engine() -> None:
    facts = EngineFacts(stores=("/data",), libraries=("/python",))
    spec = engine_spec(deployment("cpu"), msgspec.structs.replace(ORDER, engine=facts))
    assert (spec.stores, spec.libraries) == (("/data",), ("/python",))


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
