"""The way of a device, tried on the CPU: each executor has a copy of the weights, and there is one at a time."""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.values import FailureKind, Limits
from tests.integration.worker.conftest import Service, serving, spec
from tests.integration.worker.test_fidelity import trace

MEMORY = 256 << 20


@pytest.fixture(scope="module")
async def on_device(
    gpt2: Any, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    scratch = tmp_path_factory.mktemp("device")
    async with serving(gpt2, tiny_gpt2, scratch, ready=2, device="cpu:0") as service:
        yield service


def values(model: Any, **where: Any) -> None:
    with model.trace("two of a kind", **where):
        hidden = model.transformer.h[0].output.save()
        logits = model.lm_head.output.save()
        tied = (model.lm_head.weight is model.transformer.wte.weight).save()


def scaling(model: Any, **where: Any) -> None:
    with model.trace("made larger", **where):
        model.transformer.wte.weight.data.mul_(2)
        total = model.lm_head.weight.sum().save()


async def test_it_is_told(on_device: Service) -> None:
    info = on_device.info
    assert (info.device, info.device_name, info.unverified) == ("cpu:0", "stand-in", True)


async def test_numbers_are_those_of_a_local_run(on_device: Service, gpt2: Any) -> None:
    reply = await on_device.send(values)
    with gpt2.trace("two of a kind"):
        hidden = gpt2.transformer.h[0].output.save()
        logits = gpt2.lm_head.output.save()
    # A copy lies elsewhere within a cache line than a loaded checkpoint, and kernels round by that.
    torch.testing.assert_close(reply.values["logits"], logits, rtol=1e-5, atol=1e-6)
    assert reply.values["tied"]
    assert reply.saved.meta["max_mem_by_gpu"] == {"0": 0}


async def test_edits_of_weights_go_with_the_executor(on_device: Service) -> None:
    first, second = [(await on_device.send(scaling)).values["total"] for _ in range(2)]
    assert torch.equal(first, second)


async def test_one_executor_at_a_time(on_device: Service) -> None:
    engine = on_device.engine
    jobs = [on_device.job(trace) for _ in range(3)]
    most = 0
    for job in jobs:
        await on_device.run(job)
        most = max(most, len(engine._seats))
    assert most == 1


async def test_gradients_flow_through_the_copy(on_device: Service, gpt2: Any) -> None:
    def backward(model: Any, **where: Any) -> None:
        with model.trace("downhill", **where):
            hidden = model.transformer.h[0].output
            loss = model.lm_head.output.sum()
            with loss.backward():
                gradient = hidden.grad.save()

    assert (await on_device.send(backward)).values["gradient"].abs().sum() > 0


async def test_generation_finds_its_inputs_on_the_device(on_device: Service) -> None:
    def generating(model: Any, **where: Any) -> None:
        with model.generate("once upon", max_new_tokens=3, do_sample=False, **where) as tracer:
            tokens = tracer.result.save()

    assert (await on_device.send(generating)).saved.size > 0


async def test_who_runs_out_of_memory_is_told_of_the_device(on_device: Service) -> None:
    def hungry(model: Any, **where: Any) -> None:
        with model.session(**where):
            import torch

            small = torch.zeros(1 << 20)
            much = [torch.ones(64 << 20) for _ in range(64)]

    reply = await on_device.send(hungry, limits=Limits(wall_s=60, memory_bytes=MEMORY))
    assert reply.failed.kind is FailureKind.OOM
    assert "The memory of the GPU ran out." in reply.failed.message
    assert "Use a smaller batch or fewer tokens" in reply.failed.message
    error = reply.failed.meta["error"]
    assert isinstance(error, dict)
    assert error["limit"] == "gpu_memory_bytes"
    assert "ask your operator" in reply.failed.message
    assert "max_mem_by_gpu" in reply.failed.meta
    assert (await on_device.send(trace)).saved.size > 0


async def test_a_device_that_there_is_not_is_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    from edif_hpc.worker.engine.pool import Engine

    for device, words in (
        ("cuda:0,1", "choose cpu, or cuda for GPUs of NVIDIA or AMD"),
        ("cuda", "GPU|CUDA"),
    ):
        with pytest.raises(EngineError, match=words):
            await Engine(spec(tiny_gpt2, tmp_path / device, device=device)).start()
