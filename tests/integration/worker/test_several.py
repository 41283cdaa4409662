"""A model over several devices, tried on the CPU: cut by accelerate, with its hooks, and two stand-ins for devices.

It shows that every module can be read and written, and that the parts fit together. That values are moved between
devices it cannot show, where there is only one.
"""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.pool import Engine
from tests.integration.worker.conftest import Service, serving, spec


@pytest.fixture(scope="module", params=["private", "shared"])
async def several(
    request: pytest.FixtureRequest,
    gpt2: Any,
    tiny_gpt2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Service]:
    scratch = tmp_path_factory.mktemp("several")
    how = {"device": "cpu:0", "devices": 2, "weights": request.param}
    async with serving(gpt2, tiny_gpt2, scratch, **how) as service:
        assert service.info.weights == request.param
        yield service


def values(model: Any, **where: Any) -> None:
    with model.trace("two of a kind", **where):
        hidden = model.transformer.h[0].output.save()
        attended = model.transformer.h[1].attn.output[0].save()
        logits = model.lm_head.output.save()


def edited(model: Any, **where: Any) -> None:
    with model.trace("two of a kind", **where):
        model.transformer.h[0].output[:] = 1
        logits = model.lm_head.output.save()


async def test_the_model_is_cut(several: Service) -> None:
    def parts(model: Any, **where: Any) -> None:
        with model.session(**where):
            places = {str(each) for each in model._module.hf_device_map}.save()
            hooks = sum(hasattr(each, "_hf_hook") for each in model._module.modules()).save()
            tied = (model._module.lm_head.weight is model._module.transformer.wte.weight).save()

    told = (await several.send(parts)).values
    assert len(told["places"]) > 1
    assert told["hooks"] > 10
    assert told["tied"]
    assert several.info.device_name == "2 x stand-in"


async def test_numbers_are_those_of_a_local_run(several: Service, gpt2: Any) -> None:
    reply = await several.send(values)
    with gpt2.trace("two of a kind"):
        hidden = gpt2.transformer.h[0].output.save()
        attended = gpt2.transformer.h[1].attn.output[0].save()
        logits = gpt2.lm_head.output.save()
    remote = reply.values
    for name, mine in (("hidden", hidden), ("attended", attended), ("logits", logits)):
        torch.testing.assert_close(remote[name], mine, rtol=1e-5, atol=1e-6)
    assert set(reply.saved.meta["max_mem_by_gpu"]) == {"0", "1"}


async def test_what_is_written_between_the_parts_arrives(several: Service, gpt2: Any) -> None:
    reply = await several.send(edited)
    with gpt2.trace("two of a kind"):
        gpt2.transformer.h[0].output[:] = 1
        logits = gpt2.lm_head.output.save()
    torch.testing.assert_close(reply.values["logits"], logits, rtol=1e-5, atol=1e-6)


async def test_gradients_flow_through_the_parts(several: Service) -> None:
    def backward(model: Any, **where: Any) -> None:
        with model.trace("downhill", **where):
            hidden = model.transformer.h[0].output
            loss = model.lm_head.output.sum()
            with loss.backward():
                gradient = hidden.grad.save()

    assert (await several.send(backward)).values["gradient"].abs().sum() > 0


async def test_text_is_generated(several: Service, gpt2: Any) -> None:
    def generating(model: Any, **where: Any) -> None:
        with model.generate("once upon", max_new_tokens=3, do_sample=False, **where) as tracer:
            tokens = tracer.result.save()

    reply = await several.send(generating)
    with gpt2.generate("once upon", max_new_tokens=3, do_sample=False) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(reply.values["tokens"], tokens)


async def test_an_edit_of_weights_is_gone(several: Service) -> None:
    def scaling(model: Any, **where: Any) -> None:
        with model.trace("made larger", **where):
            model.transformer.h[1].mlp.c_fc.weight.data.mul_(2)
            total = model.lm_head.output.sum().save()

    first, second = [(await several.send(scaling)).values["total"] for _ in range(2)]
    assert torch.equal(first, second)


async def test_several_tasks_are_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    wanted = spec(tiny_gpt2, tmp_path / "engine", device="cpu:0", devices=2)
    with pytest.raises(EngineError, match="over 2 GPUs serves one task, not text-generation"):
        await Engine(replace(wanted, more_tasks=("feature-extraction",))).start()
