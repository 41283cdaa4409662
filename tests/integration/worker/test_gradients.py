"""Gradients are tracked when a request speaks of them, or when it turns out to need them.

Locally a graph is kept for every forward. Here it is kept only for those who walk it, and this must not
show in a result: a request whose text says nothing of it, and that needs it all the same, runs a second
time. The blocks below put the telling names together while they run, as a library would hide them.
"""

# ruff: noqa: F841, T201 - names are put together; what a block binds or prints comes back

from __future__ import annotations

import asyncio
import secrets
import struct
import time
from pathlib import Path
from typing import Any

import msgpack
import nnsight
import pytest
import torch

from edif_hpc.worker.engine.values import REPORT_BYTES, FailureKind, Limits
from tests.integration.worker.conftest import Service
from tests.integration.worker.test_fidelity import equal
from tests.integration.worker.test_outcomes import executors, line_of, still_serves


def spelled(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("names put together", **where):
        hidden = model.transformer.h[0].output
        getattr(hidden, "retain_gr" + "ad")()
        getattr(model.lm_head.output.sum(), "back" + "ward")()
        slope = getattr(hidden, "gr" + "ad").clone().save()
    return {"slope": slope}


def hooked(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("a hook on a tensor", **where):
        seen = nnsight.save([])
        model.transformer.h[0].output.register_hook(lambda slope: seen.append(slope.clone()))
        getattr(model.lm_head.output.sum(), "back" + "ward")()
    return {"seen": seen}


def nested(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("a block of its own inside", **where):
        hidden = model.transformer.h[0].output
        loss = model.lm_head.output.sum()
        with getattr(loss, "back" + "ward")():
            slope = getattr(hidden, "gr" + "ad").save()
    return {"slope": slope}


def by_a_library(model: Any, **where: Any) -> dict[str, Any]:
    """What attribution libraries do: turn gradients on themselves, for what came without."""
    with model.trace("attribution", **where):
        hidden = model.transformer.h[1].output
        with getattr(torch, "enable_gr" + "ad")():
            score = model.lm_head.weight.sum(0).mul(hidden).sum()
            engine = getattr(torch, "autogr" + "ad")
            (slope,) = getattr(engine, "gr" + "ad")(score, hidden)
        slope = slope.save()
    return {"slope": slope}


def trained(model: Any, **where: Any) -> dict[str, Any]:
    with model.session(**where):
        with model.trace("what a probe learns from"):
            hidden = model.transformer.h[1].output.clone()
        probe = torch.zeros(hidden.shape[-1])
        getattr(probe, "requires_gr" + "ad_")()
        optimizer = torch.optim.Adam([probe], lr=0.1)
        for _ in range(3):
            loss = (hidden @ probe - 1).pow(2).mean()
            getattr(loss, "back" + "ward")(retain_graph=True)
            optimizer.step()
        learned = getattr(probe, "det" + "ach")().clone().save()
    return {"learned": learned}


@pytest.mark.parametrize(
    "block", [spelled, hooked, nested, by_a_library, trained], ids=lambda block: block.__name__
)
async def test_what_needs_gradients_gets_them(service: Service, block: Any) -> None:
    local = block(service.model)
    reply = await service.send(block)
    assert reply.saved.meta["gradients"] == "retried"
    remote = reply.values
    assert all(equal(remote[name], value) for name, value in local.items())


async def test_both_runs_draw_the_same_numbers(service: Service) -> None:
    def drawing(model: Any, **where: Any) -> dict[str, Any]:
        with model.session(**where):
            import random

            import numpy as np

            print(random.random(), np.random.rand())
            noise = torch.rand(4)
            print(noise.tolist())
            weight = torch.rand(4)
            getattr(weight, "requires_gr" + "ad_")()
            getattr((noise * weight).sum(), "back" + "ward")()
            slope = getattr(weight, "gr" + "ad").save()
        return {"slope": slope}

    reply = await service.send(drawing)
    assert reply.saved.meta["gradients"] == "retried"
    assert len(reply.printed) == 2, "the second run printed something else"
    torch.manual_seed(reply.saved.meta["seed"])
    assert torch.equal(reply.values["slope"], drawing(service.model)["slope"])


# ---------------------------------------------------------------- what the text says


async def test_the_attributes_of_a_captured_module_ask_for_none(service: Service) -> None:
    """A sparse autoencoder, say; the name of this very file, and of its folder, asks for none either."""
    encoder = torch.nn.Linear(64, 8)

    def encoding(model: Any, **where: Any) -> None:
        with model.trace("a module of my own", **where):
            code = encoder(model.transformer.h[0].output).save()

    assert (await service.send(encoding)).saved.meta["gradients"] is False


async def test_a_hook_on_a_module_asks_for_them(service: Service) -> None:
    """Without them it would be called by nobody, and nothing would fail."""

    def hooking(model: Any, **where: Any) -> None:
        with model.session(**where):
            encoder = torch.nn.Linear(64, 8)
            encoder.register_full_backward_hook(print)
            done = nnsight.save(1)

    assert (await service.send(hooking)).saved.meta["gradients"] is True


async def test_a_module_of_the_researcher_is_read_too(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def slope_of(x, loss):\n    loss.backward(inputs=[x])\n    return x.grad\n"
    (tmp_path / "edif_test_helper.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    import cloudpickle
    import edif_test_helper  # type: ignore[import-not-found]

    cloudpickle.register_pickle_by_value(edif_test_helper)  # as the client does, once per process

    def helped(model: Any, **where: Any) -> dict[str, Any]:
        with model.trace("help from next door", **where):
            hidden = model.transformer.h[0].output
            hidden.retain_grad()
            slope = edif_test_helper.slope_of(hidden, model.lm_head.output.sum()).clone().save()
        return {"slope": slope}

    local = helped(service.model)
    reply = await service.send(helped)
    assert reply.saved.meta["gradients"] is True
    assert equal(reply.values["slope"], local["slope"])


# ---------------------------------------------------------------- two runs


async def test_what_was_said_is_not_said_again(service: Service) -> None:
    def talking(model: Any, **where: Any) -> None:
        with model.trace("talk", **where):
            for _ in range(3):
                print("the same")
            hidden = model.transformer.h[0].output
            print(hidden[0, 0, :2])
            getattr(model.lm_head.output.sum(), "back" + "ward")()
            print("the same")
            print("the end")
            done = nnsight.save(1)

    reply = await service.send(talking)
    assert reply.values["done"] == 1
    first, second = reply.printed[3:5]
    assert reply.printed == ["the same"] * 3 + [first, second, "the same", "the end"]
    assert "grad_fn" not in first
    assert "grad_fn" in second


async def test_a_run_is_repeated_once(service: Service) -> None:
    def hopeless(model: Any, **where: Any) -> None:
        with model.session(**where):
            print(secrets.token_hex(4))
            getattr(torch.zeros(1), "back" + "ward")()

    reply = await service.send(hopeless)
    assert reply.failed.kind is FailureKind.USER
    assert reply.failed.meta["gradients"] == "retried"
    assert line_of(hopeless, "torch.zeros(1)") in reply.failed.message
    assert len(reply.printed) == 2


async def test_another_error_is_not_tried_again(service: Service) -> None:
    def failing(model: Any, **where: Any) -> None:
        with model.session(**where):
            raise RuntimeError("a shape is wrong")

    failed = (await service.send(failing)).failed
    assert failed.meta["gradients"] is False


async def test_both_runs_share_the_time(service: Service) -> None:
    def slow(model: Any, **where: Any) -> None:
        with model.session(**where):
            import time

            time.sleep(1)
            getattr(torch.zeros(1, **{"requires_gr" + "ad": True}).sum(), "back" + "ward")()
            done = nnsight.save(1)

    reply = await service.send(slow)
    assert reply.values["done"] == 1
    assert reply.saved.meta["runtime_s"] > 2
    failed = (await service.send(slow, limits=Limits(wall_s=1.7))).failed
    assert failed.kind is FailureKind.TIMEOUT
    assert "1.7 s" in failed.message
    assert failed.meta["gradients"] == "retried"
    assert 1.6 < failed.meta["runtime_s"] < 1.9


def lingering(model: Any, **where: Any) -> None:
    with model.session(**where):
        import os

        print(os.urandom(4).hex())
        getattr((torch.zeros(1, **{"requires_gr" + "ad": True}) * 2).sum(), "back" + "ward")()
        while True:
            pass


async def test_the_first_executor_is_gone_before_the_second_runs(walled: Service) -> None:
    """And cancelling ends the second as it would end the first."""
    seen: list[set[int]] = []
    both = asyncio.Event()

    def said(_: str) -> None:
        seen.append(executors(walled))
        if len(seen) == 2:
            both.set()

    task = asyncio.create_task(walled.engine.run(walled.job(lingering), said))
    await asyncio.wait_for(both.wait(), 30)
    assert seen[0] - seen[1]
    task.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 2
    assert seen[1] - executors(walled)
    await still_serves(walled)


def frame(name: str, **fields: Any) -> bytes:
    payload = msgpack.packb([name, fields])
    return struct.pack(">I", len(payload)) + payload


@pytest.mark.parametrize(("written", "runs"), [(False, 2), (True, 1)])
async def test_an_executor_cannot_have_itself_repeated_for_ever(
    service: Service, written: bool, runs: int
) -> None:
    """Nor at all, once a part of its result may be with the client."""
    lie = frame("Broken", kind="user", message="again!", lacked_gradients=True, meta={})
    part = REPORT_BYTES if written else 0
    content = (frame("Written", size=part) if written else b"") + lie

    def lying(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            import time

            print(os.urandom(4).hex())
            os.ftruncate(4, part)
            os.write(3, content)
            time.sleep(60)

    reply = await service.send(lying)
    assert reply.failed.message == "again!"
    assert len(reply.printed) == runs
    await still_serves(service)
