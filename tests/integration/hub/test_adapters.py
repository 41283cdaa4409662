"""An adapter that was published on the relay's hub: for clients, and for the workers that serve it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from edif_hpc.domain.adapter import Adapter
from edif_hpc.objects.repository import read_manifest
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import EngineSpec, Level

if TYPE_CHECKING:
    from conftest import Relay

NAME, ADAPTER = "lab/tiny", "lab/tiny-lora"
CLIENT = """
import json, sys
from nnsight import TransformersModel
model = TransformersModel(sys.argv[1], task="text-generation", peft=sys.argv[2])
loaded = TransformersModel(sys.argv[1], task="text-generation", peft=sys.argv[2], dispatch=True)
print(json.dumps({
    "env": model._remoteable_get_env(),
    "paths": "transformer.h.0.attn.c_attn.lora_A.default" in dict(model._module.named_modules()),
    "loaded": bool(dict(loaded._module.named_parameters())
                   ["transformer.h.0.attn.c_attn.lora_B.default.weight"].abs().sum() > 0),
}))
"""


@pytest.fixture
def published(start_relay: Callable[..., Relay], tiny_gpt2: Path, tiny_lora: Path) -> Relay:
    relay = start_relay()
    relay.cli("hub", "publish", NAME, str(tiny_gpt2), "--weights")
    relay.cli("hub", "publish", ADAPTER, str(tiny_lora), "--weights")
    return relay


@pytest.mark.slow
def test_a_client_needs_no_other_hub(
    published: Relay, run_client: Callable[..., dict[str, Any]]
) -> None:
    seen = run_client(CLIENT, published.hub, NAME, ADAPTER)
    assert seen["env"]["peft"] == ADAPTER
    assert seen["paths"]
    assert seen["loaded"]


@pytest.mark.slow
async def test_a_worker_takes_it_from_there(
    published: Relay, tiny_lora: Path, tmp_path: Path
) -> None:
    commit = read_manifest(tiny_lora).commit
    spec = EngineSpec(
        model_key=f'nnsight.modeling.transformers.TransformersModel:{{"repo_id": "{NAME}", "revision": null, "task": "text-generation"}}',
        source=NAME,
        adapters=(Adapter(repo_id=ADAPTER, revision=commit),),
        scratch=tmp_path / "engine",
        floor=Level.PROCESS,
        ready=1,
        hub_endpoint=published.hub,
        hub_cache=tmp_path / "cache",
    )
    engine = Engine(spec)
    try:
        info = await engine.start()
    finally:
        await engine.stop()
    assert info.adapters == {ADAPTER: commit}
