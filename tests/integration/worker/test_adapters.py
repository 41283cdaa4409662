"""Adapters of the allow-list: fetched before the engine is up, attached for one request, numbers of a local run."""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

import shutil
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight import TransformersModel

from edif_hpc.domain.adapter import Adapter
from edif_hpc.errors import EngineError, SettingsError
from edif_hpc.testing.adapters import build_tiny_lora
from edif_hpc.testing.hub import Repo, serve_hub
from edif_hpc.worker.engine.messages import Load
from edif_hpc.worker.engine.model import loading
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import FailureKind
from tests.integration.worker.conftest import Block, Reply, Service, serving, spec

NAME = "lab/tiny-lora"


def trace(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("The Eiffel Tower is in", **where):
        inner = model.transformer.h[0].attn.c_attn.output.save()
        logits = model.lm_head.output.save()
    return {"inner": inner, "logits": logits}


def generation(model: Any, **where: Any) -> dict[str, Any]:
    with model.generate("def main(", max_new_tokens=4, do_sample=False, **where) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


def backward(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("gradients flow", **where):
        hidden = model.transformer.h[0].output
        hidden.requires_grad_(True)
        loss = model.lm_head.output.sum()
        with loss.backward():
            gradient = hidden.grad.save()
    return {"gradient": gradient}


def inside(model: Any, **where: Any) -> dict[str, Any]:
    """What only the adapter has is named as it is locally."""
    with model.trace("look inside", **where):
        down = model.transformer.h[0].attn.c_attn.lora_A.default.output.save()
    return {"down": down}


@pytest.fixture(scope="module")
def adapted(tiny_gpt2: Path, tiny_lora: Path) -> Any:
    """The client's model with the adapter, which it has from a folder here."""
    model = TransformersModel(
        str(tiny_gpt2), task="text-generation", dispatch=True, peft=str(tiny_lora)
    )
    assert model.peft == str(tiny_lora)
    return model


@pytest.fixture(scope="module")
async def adapting(
    gpt2: Any, tiny_gpt2: Path, tiny_lora: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    """An engine that serves the adapter beside the model; its hub is away once it is up."""
    folder = tmp_path_factory.mktemp("adapting")
    with serve_hub({NAME: tiny_lora}) as url:
        changes = {"adapters": (Adapter(repo_id=NAME),), "hub_cache": folder / "cache"}
        service = serving(gpt2, tiny_gpt2, folder / "engine", hub_endpoint=url, **changes)
        started = await service.__aenter__()
    try:
        yield started
    finally:
        await service.__aexit__(None, None, None)


async def send(service: Service, model: Any, block: Block, **env: Any) -> Reply:
    """Send the block as a client would whose adapter has the hub's name."""
    job = replace(service, model=model).job(block)
    if "peft" in job.env:
        env = {"peft": NAME} | env
    return await service.run(replace(job, env={**job.env, **env}))


@pytest.mark.parametrize("block", [trace, generation, backward, inside])
async def test_with_an_adapter_numbers_are_those_of_a_local_run(
    adapting: Service, adapted: Any, tiny_lora: Path, block: Block
) -> None:
    local = block(adapted)
    reply = await send(adapting, adapted, block)
    values = reply.values
    assert local
    for name, value in local.items():
        assert torch.equal(values[name], value), name
    commit = Repo.read(NAME, tiny_lora).commit
    assert reply.saved.meta["adapter"] == {"repo_id": NAME, "commit": commit}
    assert adapting.info.adapters == {NAME: commit}


async def test_an_adapter_is_gone_with_its_request(
    adapting: Service, adapted: Any, gpt2: Any
) -> None:
    plain, changed = trace(gpt2), trace(adapted)
    assert not torch.equal(plain["logits"], changed["logits"])
    for model, local in [(adapted, changed), (gpt2, plain), (adapted, changed), (gpt2, plain)]:
        reply = await send(adapting, model, trace)
        assert torch.equal(reply.values["logits"], local["logits"])
        assert ("adapter" in reply.saved.meta) is (model is adapted)

    def trainable(model: Any, **where: Any) -> None:
        with model.session(**where):
            count = nnsight.save(sum(each.requires_grad for each in model._module.parameters()))

    with_adapter = await send(adapting, adapted, trainable)
    assert with_adapter.values["count"] == 0  # as peft leaves it, here and there
    assert (await send(adapting, gpt2, trainable)).values["count"] == len(
        list(gpt2._module.parameters())
    )


async def test_attaching_moves_no_random_numbers(adapting: Service, adapted: Any) -> None:
    def drawing(model: Any, **where: Any) -> None:
        with model.session(**where):
            drawn = nnsight.save(torch.rand(3))

    reply = await send(adapting, adapted, drawing)
    torch.manual_seed(reply.saved.meta["seed"])
    assert torch.equal(reply.values["drawn"], torch.rand(3))


@pytest.mark.parametrize("asked", ["somebody/else", "../../etc", ["lab/tiny-lora"], {}])
async def test_what_is_not_listed_is_refused(adapting: Service, gpt2: Any, asked: Any) -> None:
    failed = (await send(adapting, gpt2, trace, peft=asked)).failed
    assert failed.kind is FailureKind.USER
    assert f"{asked!r} is not served; choose of ['{NAME}']" in failed.message


async def refusal(source: Path, scratch: Path, adapter: Path, **changes: Any) -> str:
    """What an engine says that cannot start with this adapter."""
    with serve_hub({NAME: adapter}) as url:
        told = {"adapters": (Adapter(repo_id=NAME),), "hub_endpoint": url} | changes
        engine = Engine(spec(source, scratch / "engine", hub_cache=scratch / "cache", **told))
        with pytest.raises(EngineError) as error:
            await engine.start()
    return str(error.value)


async def test_a_pickle_is_refused_before_it_is_fetched(
    tiny_gpt2: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    pickled = shutil.copytree(tiny_lora, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    said = await refusal(tiny_gpt2, tmp_path, pickled)
    assert (
        f"cannot have the adapter '{NAME}': its weights are a pickle (adapter_model.bin)" in said
    )
    assert not list((tmp_path / "cache").rglob("*.bin"))


async def test_only_the_two_files_of_an_adapter_are_fetched(
    gpt2: Any, tiny_gpt2: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    full = shutil.copytree(tiny_lora, tmp_path / "full")
    for other in ("optimizer.pt", "adapter_model.bin", "modeling.py", "tokenizer.json"):
        (full / other).write_text("not wanted")
    pinned = Adapter(repo_id=NAME, revision=Repo.read(NAME, full).commit)
    with serve_hub({NAME: full}) as url:
        changes = {"adapters": (pinned,), "hub_endpoint": url, "hub_cache": tmp_path / "cache"}
        async with serving(gpt2, tiny_gpt2, tmp_path / "engine", **changes) as service:
            assert service.info.adapters == {NAME: pinned.revision}
    fetched = {file.name for file in (tmp_path / "cache").glob("*/snapshots/*/*")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    # What was fetched serves when the hub is away.
    async with serving(gpt2, tiny_gpt2, tmp_path / "again", **changes) as service:
        assert service.info.adapters == {NAME: pinned.revision}


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (Adapter(repo_id="lab/other"), "cannot have the adapter 'lab/other': "),
        (Adapter(repo_id=NAME, revision="v9"), f"cannot have the adapter '{NAME}@v9': "),
    ],
)
async def test_an_adapter_that_is_not_there_is_named(
    tiny_gpt2: Path, tiny_lora: Path, tmp_path: Path, adapter: Adapter, words: str
) -> None:
    assert words in await refusal(tiny_gpt2, tmp_path, tiny_lora, adapters=(adapter,))


async def test_an_adapter_for_another_model_ends_the_start(
    tiny_gpt2: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    foreign = build_tiny_lora(tmp_path / "foreign", tiny_llama, targets=["q_proj"])
    said = await refusal(tiny_gpt2, tmp_path, foreign)
    assert f"the self-test with the adapter {NAME} failed (user)" in said
    assert "q_proj" in said


def test_without_peft_the_way_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.functional", None)
    load = Load(
        model_key="", more_tasks=[], folder="/", commit=None, adapters={NAME: "/a"}, dtype="auto", device="cpu", threads=1,
        scratch="/", ceiling="full", floor="full",
    )  # fmt: skip
    with pytest.raises(SettingsError, match=rf"{NAME}.*pip install peft"):
        loading.import_peft(load)
    loading.import_peft(replace(load, adapters={}))
