"""From a hub: fetched with progress, pinned, and the same as loaded by the client."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.domain.deployment import parse_model_key
from edif_hpc.errors import EngineError
from edif_hpc.testing.hub import Repo, serve_hub
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import EngineInfo, EngineSpec, Level, Progress
from tests.integration.worker.conftest import Service, spec
from tests.integration.worker.test_fidelity import trace


@pytest.fixture
def hub_spec(loopback_hub: str, tmp_path: Path) -> EngineSpec:
    local = spec(Path("unused"), tmp_path / "engine")
    return replace(
        local, source="edif/tiny-gpt2", hub_endpoint=loopback_hub, hub_cache=tmp_path / "cache"
    )


async def test_a_model_from_a_hub(hub_spec: EngineSpec, gpt2: Any) -> None:
    seen: list[Progress] = []
    engine = Engine(hub_spec)
    try:
        info = await engine.start(seen.append)
        assert info.commit is not None
        assert len(info.commit) == 40
        assert info.packages["nnsight"].startswith("0.8")
        assert info.weights_bytes > 100_000
        stages = list(dict.fromkeys(progress.stage for progress in seen))
        assert stages == ["fetching", "importing", "loading", "placing", "self-test"]
        fetched = [progress for progress in seen if progress.stage == "fetching"]
        assert fetched[-1].done > info.weights_bytes
        reply = await Service(engine=engine, info=info, model=gpt2).send(trace)
        assert torch.equal(reply.values["logits"], trace(gpt2)["logits"])
    finally:
        await engine.stop()


async def test_what_was_fetched_serves_when_the_hub_is_away(
    hub_spec: EngineSpec, tiny_gpt2: Path, tmp_path: Path
) -> None:
    full = shutil.copytree(tiny_gpt2, tmp_path / "full")
    (full / "README.md").write_text("a file that no worker wants")
    commits = []
    with serve_hub({hub_spec.source: full}) as url:
        with_hub = replace(hub_spec, hub_endpoint=url)
        commits.append((await started_and_stopped(with_hub)).commit)
    commits.append((await started_and_stopped(with_hub)).commit)
    assert commits == [Repo.read("", full).commit] * 2
    with pytest.raises(EngineError, match="cannot have 'edif/tiny-gpt2' at revision 'other'"):
        await Engine(replace(with_hub, revision="other")).start()


async def started_and_stopped(spec: EngineSpec) -> EngineInfo:
    engine = Engine(spec)
    try:
        return await engine.start()
    finally:
        await engine.stop()


async def test_a_name_that_the_hub_does_not_know(hub_spec: EngineSpec) -> None:
    engine = Engine(replace(hub_spec, source="nobody/nothing"))
    with pytest.raises(EngineError, match="nobody/nothing"):
        await engine.start()


async def test_the_dtype_is_the_deployments(tiny_gpt2: Path, tmp_path: Path, gpt2: Any) -> None:
    engine = Engine(spec(tiny_gpt2, tmp_path / "engine", dtype="bfloat16", ceiling=Level.PROCESS))
    try:
        info = await engine.start()
        assert info.dtype == "bfloat16"
        reply = await Service(engine=engine, info=info, model=gpt2).send(trace)
        assert reply.values["hidden"].dtype is torch.bfloat16
    finally:
        await engine.stop()


async def test_a_dtype_that_is_none(tiny_gpt2: Path, tmp_path: Path) -> None:
    engine = Engine(spec(tiny_gpt2, tmp_path / "engine", dtype="float31"))
    with pytest.raises(EngineError, match="float31"):
        await engine.start()


OWN_CODE = """
from pathlib import Path
from transformers import GPT2Config, GPT2LMHeadModel

Path({marker!r}).write_text("ran")

class OwnConfig(GPT2Config):
    model_type = {kind!r}

class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


@pytest.mark.parametrize(
    ("kind", "trusted", "served"),
    [("own", False, False), ("gpt2", False, True), ("own", True, True)],
)
async def test_a_models_own_code_does_not_run_unless_its_deployment_says_so(
    tiny_gpt2: Path, tmp_path: Path, kind: str, *, trusted: bool, served: bool
) -> None:
    """Whether or not the library could do without it: the checkpoint asks for it in both cases."""
    folder, marker = shutil.copytree(tiny_gpt2, tmp_path / "model"), tmp_path / "marker"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(OWN_CODE.format(marker=str(marker), kind=kind))
    said = spec(folder, tmp_path / "engine", ceiling=Level.PROCESS)
    if trusted:
        key = replace(parse_model_key(said.model_key), trust_remote_code=True)
        said = replace(said, model_key=key.render())
    if served:
        await started_and_stopped(said)
    else:
        with pytest.raises(EngineError, match="trust_remote_code"):
            await started_and_stopped(said)
    assert marker.exists() is trusted
