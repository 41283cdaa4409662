"""What a request computes is what the same block computes locally, bit for bit."""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

from edif_hpc.testing.models import build_chat_llama
from tests.integration.worker.conftest import Service, client, serving


def trace(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("The Eiffel Tower is in", **where):
        hidden = model.transformer.h[0].output.save()
        logits = model.lm_head.output.save()
    return {"hidden": hidden, "logits": logits}


def invokes(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace(**where) as tracer:
        with tracer.invoke("one two three"):
            first = model.transformer.h[1].output.save()
        with tracer.invoke("a longer prompt than the other"):
            second = model.transformer.h[1].output.save()
        with tracer.invoke():
            both = model.lm_head.output.save()
    return {"first": first, "second": second, "both": both}


def patching(model: Any, **where: Any) -> dict[str, Any]:
    with model.session(**where):
        with model.trace("a clean prompt"):
            clean = model.transformer.h[0].output[:, -1].clone()
        with model.trace("another prompt"):
            model.transformer.h[0].output[:, -1] = clean
            patched = model.lm_head.output[:, -1].save()
    return {"patched": patched}


def generation(model: Any, **where: Any) -> dict[str, Any]:
    with model.generate("def main(", max_new_tokens=4, do_sample=False, **where) as tracer:
        ids = tracer.result.save()
    return {"ids": ids}


def steps(model: Any, **where: Any) -> dict[str, Any]:
    with model.generate("def main(", max_new_tokens=3, do_sample=False, **where) as tracer:
        hiddens = nnsight.save([])
        for _ in tracer.iter[:3]:
            hiddens.append(model.transformer.h[1].output[:, -1])
    return {"hiddens": hiddens}


def backward(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("gradients flow", **where):
        hidden = model.transformer.h[0].output
        loss = model.lm_head.output.sum()
        with loss.backward():
            gradient = hidden.grad.save()
    return {"gradient": gradient}


def caching(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("keep everything", **where) as tracer:
        cache = tracer.cache(modules=[model.transformer.h[0], model.transformer.h[1]])
    return {
        path: cache[path].output for path in ("model.transformer.h.0", "model.transformer.h.1")
    }


def skipping(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("leave out a layer", **where):
        model.transformer.h[1].skip(model.transformer.h[0].output)
        logits = model.lm_head.output.save()
    return {"logits": logits}


def stopping(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("no further", **where) as tracer:
        hidden = model.transformer.h[0].output.save()
        tracer.stop()
    return {"hidden": hidden}


def editing(model: Any, **where: Any) -> dict[str, Any]:
    with model.edit() as (_, edited):
        edited.transformer.h[0].output[:] = 0
    with edited.trace("an edited model", **where):
        logits = edited.lm_head.output.save()
    return {"logits": logits}


def helpers(model: Any, **where: Any) -> dict[str, Any]:
    scale = 3.0

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x / x.norm() * scale

    with model.trace("a function of my own", **where):
        hidden = normed(model.transformer.h[0].output).save()
    return {"hidden": hidden}


def attention(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("which tokens look where", output_attentions=True, **where):
        pattern = model.output.attentions[0].save()
    return {"pattern": pattern}


def operations(model: Any, **where: Any) -> dict[str, Any]:
    attention = model.transformer.h[1].attn
    assert "attention_interface_1" in str(
        attention.source
    )  # touched before the trace, as it must be
    with model.trace("inside a forward", **where):
        projected = attention.c_attn.output.save()
        mixed = attention.source.attention_interface_1.output[0].save()
    return {"projected": projected, "mixed": mixed}


def barriers(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace(**where) as tracer:
        meet = tracer.barrier(2)
        with tracer.invoke("a donor of embeddings"):
            given = model.transformer.wte.output
            meet()
        with tracer.invoke("_ _ _ _"):
            meet()
            model.transformer.wte.output = given
            logits = model.lm_head.output.save()
    return {"logits": logits}


def modules(model: Any, **where: Any) -> dict[str, Any]:
    class Autoencoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            self.weight = torch.nn.Parameter(torch.randn(64, 256, generator=generator))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x @ self.weight) @ self.weight.T

    autoencoder = Autoencoder()
    with model.trace("a module of my own", **where):
        hidden = model.transformer.h[0].output
        model.transformer.h[0].output = autoencoder(hidden)
        logits = model.lm_head.output.save()
    return {"logits": logits}


BLOCKS = [
    trace, invokes, patching, generation, steps, backward, caching, skipping, stopping, editing,
    helpers, operations, barriers, modules,
]  # fmt: skip


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
async def test_equal_to_a_local_run(service: Service, block: Any) -> None:
    local = block(service.model)
    remote = (await service.send(block)).values
    if block is caching:
        remote = {path: remote["cache"][path].output for path in local}
    assert local.keys() <= remote.keys()
    assert all(equal(remote[name], value) for name, value in local.items())


async def test_llama_with_its_rotary_buffers_and_ties(tiny_llama: Path, tmp_path: Path) -> None:
    def layers(model: Any, **where: Any) -> dict[str, Any]:
        with model.trace("positions matter here", **where):
            hidden = model.model.layers[1].output.save()
            logits = model.lm_head.output.save()
            tied = nnsight.save(
                model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
            )
        return {"hidden": hidden, "logits": logits, "tied": tied}

    model = client(tiny_llama)
    async with serving(model, tiny_llama, tmp_path / "engine", threads=2) as service:
        local = layers(model)
        remote = (await service.send(layers)).values
        assert local["tied"]
        assert remote["tied"]
        assert torch.equal(remote["hidden"], local["hidden"])
        assert torch.equal(remote["logits"], local["logits"])


async def test_attention_is_what_the_client_resolved(tiny_gpt2: Path, service: Service) -> None:
    from nnsight import TransformersModel

    eager = TransformersModel(
        str(tiny_gpt2), task="text-generation", dispatch=True, attn_implementation="eager"
    )
    theirs = Service(engine=service.engine, info=service.info, model=eager)
    reply = await theirs.send(attention)
    assert reply.saved.meta["attn_implementation"] == "eager"
    assert torch.equal(reply.values["pattern"], attention(eager)["pattern"])
    # The next request, by a client that resolved another, is not affected.
    assert (await service.send(trace)).saved.meta["attn_implementation"] == "sdpa"


async def test_a_chat_is_laid_out_as_it_is_locally(tmp_path: Path) -> None:
    def chat(model: Any, **where: Any) -> dict[str, Any]:
        talk = [{"role": "user", "content": "hello"}]
        with model.pipe(talk, max_new_tokens=3, do_sample=False, **where) as tracer:
            hidden = model.model.layers[0].output.save()
            records = tracer.result.save()
        return {"hidden": hidden, "records": records}

    path = build_chat_llama(tmp_path / "model", words=["hello", "user", ":", "assistant"])
    model = client(path)
    async with serving(model, path, tmp_path / "engine") as service:
        local, remote = chat(model), (await service.send(chat)).values
        assert torch.equal(remote["hidden"], local["hidden"])
        assert remote["records"] == local["records"]
        assert [turn["role"] for turn in local["records"][0]["generated_text"]] == [
            "user",
            "assistant",
        ]


async def test_a_module_attached_to_the_model_is_named_as_what_cannot_travel(
    tiny_gpt2: Path, service: Service
) -> None:
    model = client(tiny_gpt2)
    model.transformer.h[0].extra = torch.nn.Identity()
    theirs = Service(engine=service.engine, info=service.info, model=model)
    failed = (await theirs.send(trace)).failed
    assert "Module:model.transformer.h.0.extra" in failed.message
    assert "keep it in a variable" in failed.message


async def test_gradients_are_tracked_only_when_the_request_speaks_of_them(
    service: Service,
) -> None:
    assert (await service.send(trace)).saved.meta["gradients"] is False
    assert (await service.send(backward)).saved.meta["gradients"] is True


async def test_a_session_may_turn_gradients_on(service: Service) -> None:
    def training(model: Any, **where: Any) -> None:
        with model.session(**where):
            with torch.no_grad():  # noqa: SIM117 - a traced block has its own `with`
                with model.trace("an activation"):
                    x = model.transformer.h[0].output.clone()
            with torch.enable_grad():
                weight = torch.zeros(x.shape[-1], requires_grad=True)
                ((x @ weight) - 1).pow(2).mean().backward()
                slope = weight.grad.clone().save()

    assert (await service.send(training)).values["slope"].abs().sum() > 0


async def test_a_captured_list_comes_back(service: Service) -> None:
    def collecting(model: Any, **where: Any) -> None:
        found: list[Any] = []
        by_layer: dict[int, Any] = {}
        with model.trace("into a list", **where):
            found.append(model.transformer.h[0].output.save())
            by_layer[1] = {"out": model.transformer.h[1].output.save()}

    values = (await service.send(collecting)).values
    assert len(values["found"]) == 1
    assert values["by_layer"][1]["out"].shape == values["found"][0].shape


async def test_a_saved_view_carries_only_what_it_shows(service: Service) -> None:
    def viewing(model: Any, **where: Any) -> None:
        with model.trace("word " * 60, **where):
            last = model.lm_head.output[:, -1].save()
            same = last

    reply = await service.send(viewing, compress=False)
    assert reply.saved.size < 3 * 1024 * 4
    values = reply.values
    assert values["last"].untyped_storage().nbytes() == 1024 * 4


async def test_seeds_differ_between_requests_and_are_told(service: Service) -> None:
    def drawing(model: Any, **where: Any) -> None:
        import random

        import numpy as np

        with model.session(**where):
            drawn = nnsight.save([torch.rand(1).item(), random.random(), float(np.random.rand())])

    replies = [await service.send(drawing) for _ in range(3)]
    draws = {tuple(reply.values["drawn"]) for reply in replies}
    assert len(draws) == 3
    assert len({reply.saved.meta["seed"] for reply in replies}) == 3
    torch.manual_seed(replies[0].saved.meta["seed"])
    assert torch.rand(1).item() == replies[0].values["drawn"][0]


async def test_tampering_with_weights_is_gone_with_the_request(service: Service) -> None:
    def tampering(model: Any, **where: Any) -> None:
        with model.trace("spoil it", **where):
            model.transformer.h[0].mlp.c_fc.weight.data.zero_()
            gone = model.transformer.h[0].mlp.c_fc.weight.abs().sum().save()

    local = trace(service.model)
    assert (await service.send(tampering)).values["gone"] == 0
    after = (await service.send(trace)).values
    assert torch.equal(after["logits"], local["logits"])
