"""What a worker loads has the commit that the hub shows, from a folder and from the hub itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from edif_hpc.objects.repository import read_manifest
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import EngineInfo, EngineSpec, Level

if TYPE_CHECKING:
    from conftest import Relay

NAME = "lab/tiny"
KEY = f'nnsight.modeling.transformers.TransformersModel:{{"repo_id": "{NAME}", "revision": null, "task": "text-generation"}}'


async def load(spec: EngineSpec) -> EngineInfo:
    engine = Engine(spec)
    try:
        return await engine.start()
    finally:
        await engine.stop()


@pytest.mark.slow
async def test_a_folder_and_the_hub_have_one_commit(
    start_relay: Callable[..., Relay], tiny_gpt2: Path, tmp_path: Path
) -> None:
    relay = start_relay()
    relay.cli("hub", "publish", NAME, str(tiny_gpt2), "--weights")
    commit = read_manifest(tiny_gpt2).commit
    spec = EngineSpec(
        model_key=KEY,
        source=str(tiny_gpt2),
        scratch=tmp_path / "folder",
        floor=Level.PROCESS,
        ready=1,
    )
    folder = await load(spec)
    assert folder.commit == commit
    from_hub = replace(
        spec,
        source=NAME,
        scratch=tmp_path / "from-hub",
        hub_endpoint=relay.hub,
        hub_cache=tmp_path / "cache",
    )
    loaded = await load(from_hub)
    assert loaded.commit == commit
    assert loaded.weights_bytes == folder.weights_bytes
