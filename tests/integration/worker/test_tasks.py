"""Several tasks of one checkpoint from one set of weights, each with the numbers of a plain local load."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnsight import TransformersModel
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from edif_hpc.errors import EngineError, SettingsError
from edif_hpc.worker.engine.messages import Load
from edif_hpc.worker.engine.model import loading
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import FailureKind
from edif_hpc.worker.engine.weights.base import MemoryFile
from tests.integration.worker.conftest import KEY, Service, spec

#: nnsight says so of every BERT: a module of its is called `output`.
pytestmark = pytest.mark.filterwarnings("ignore:Module .* has a submodule named 'output'")

GENERATION, FEATURES, MASKS = "text-generation", "feature-extraction", "fill-mask"


def key(task: str) -> str:
    return KEY.replace(GENERATION, task)


@dataclass(kw_only=True)
class Several:
    """An engine with several tasks, and a client's model for each."""

    engine: Engine
    services: dict[str, Service]

    @property
    def weights_bytes(self) -> int:
        return next(iter(self.services.values())).info.weights_bytes


@asynccontextmanager
async def serving_tasks(
    source: Path, scratch: Path, models: dict[str, Any]
) -> AsyncIterator[Several]:
    first, *more = models
    wanted = replace(spec(source, scratch), model_key=key(first), more_tasks=tuple(more))
    engine = Engine(wanted)
    info = await engine.start()
    try:
        yield Several(
            engine=engine,
            services={
                task: Service(engine=engine, info=info, model=model, key=key(task))
                for task, model in models.items()
            },
        )
    finally:
        await engine.stop()


def local(source: Path, task: str) -> Any:
    return TransformersModel(str(source), task=task, dispatch=True)


# -- a causal language model and its base ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
async def gpt2s(
    tiny_gpt2: Path, gpt2: Any, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Several]:
    models = {GENERATION: gpt2, FEATURES: local(tiny_gpt2, FEATURES)}
    async with serving_tasks(tiny_gpt2, tmp_path_factory.mktemp("engine"), models) as several:
        yield several


def logits(model: Any, **where: Any) -> Any:
    with model.trace("The Eiffel Tower is in", **where):
        hidden = model.transformer.h[1].output.save()
        out = model.lm_head.output.save()
    return hidden, out


def features(model: Any, **where: Any) -> Any:
    with model.trace("The Eiffel Tower is in", **where):
        hidden = model.h[1].output.save()
        out = model.output.last_hidden_state.save()
    return hidden, out


async def test_each_task_has_the_numbers_of_a_local_load(gpt2s: Several) -> None:
    for task, block in ((GENERATION, logits), (FEATURES, features)):
        service = gpt2s.services[task]
        reply = await service.send(block)
        hidden, out = block(service.model)
        assert torch.equal(reply.values["hidden"], hidden), task
        assert torch.equal(reply.values["out"], out), task
        assert "random_weights" not in reply.saved.meta
        assert reply.saved.meta["model_key"] == key(task)


async def test_the_weights_are_there_once(gpt2s: Several, gpt2: Any) -> None:
    single = sum(tensor.nbytes for tensor in gpt2._module.parameters())
    assert single <= gpt2s.weights_bytes < 1.2 * single
    info = gpt2s.services[FEATURES].info
    assert info.tasks == {GENERATION: "GPT2LMHeadModel", FEATURES: "GPT2Model"}


async def test_an_edit_of_weights_in_one_task_is_not_seen_by_another(gpt2s: Several) -> None:
    def spoil(model: Any, **where: Any) -> Any:
        with model.trace("Hello", **where):
            model.transformer.wte._module.weight.data.zero_()
            hidden = model.transformer.h[1].output.save()
            out = model.lm_head.output.save()
        return hidden, out

    spoiled = await gpt2s.services[GENERATION].send(spoil)
    assert not spoiled.values["out"].any()
    service = gpt2s.services[FEATURES]
    assert torch.equal((await service.send(features)).values["out"], features(service.model)[1])


async def test_a_task_that_is_not_served(gpt2s: Several) -> None:
    service = gpt2s.services[FEATURES]
    job = replace(service.job(features), model_key=key("text-classification"))
    failed = (await service.run(job)).failed
    assert failed.kind is FailureKind.USER
    assert (
        "'text-classification' is not served here; served: text-generation, feature"
        in failed.message
    )


def load(source: Path, *tasks: str, dtype: str = "float32") -> Load:
    first, *more = tasks
    return Load(
        model_key=key(first), more_tasks=more, folder=str(source), commit=None, adapters={}, dtype=dtype,
        device="cpu", threads=1, scratch="/", ceiling="process", floor="process",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_parameter_and_buffer_is_that_of_a_plain_load(tiny_llama: Path, dtype: str) -> None:
    """Under each of its names, tied as there, at the same place within a cache line."""
    holder, sizes = MemoryFile(), []
    for asked, model in loading.load_models(load(tiny_llama, GENERATION, FEATURES, dtype=dtype)):
        sizes.append(holder.take(model._module, lambda *_: None))
        options = {"task": asked.task, "dtype": getattr(torch, dtype), "dispatch": True}
        plain = TransformersModel(str(tiny_llama), **options)
        assert list(named(model)) == list(named(plain))
        for name, (tensor, other) in zip(
            named(plain),
            zip(named(model).values(), named(plain).values(), strict=True),
            strict=True,
        ):
            assert torch.equal(tensor, other), name
            assert tensor.dtype is other.dtype
            assert tensor.data_ptr() % 64 == other.data_ptr() % 64, name
        assert ties(model) == ties(plain)
    assert sizes[1] == 0, "the base model of a tied one has nothing of its own"


def named(model: Any) -> dict[str, torch.Tensor]:
    module = model._module
    return dict(module.named_parameters(remove_duplicate=False)) | dict(
        module.named_buffers(remove_duplicate=False)
    )


def ties(model: Any) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in named(model).items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


# -- what a checkpoint lacks -------------------------------------------------------------------------------------------


async def test_a_head_that_is_not_in_the_checkpoint_is_refused(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    wanted = replace(spec(tiny_gpt2, tmp_path / "engine"), more_tasks=("text-classification",))
    with pytest.raises(
        EngineError, match=r"no weights for score\.weight, which GPT2ForSequenceCl"
    ):
        await Engine(wanted).start()


def test_what_a_head_lacks_is_named(masked_bert: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"classifier\.weight, classifier\.bias, which BertFor"
    ):
        list(loading.load_models(load(masked_bert, "token-classification")))


# -- an encoder --------------------------------------------------------------------------------------------------------


def filled(model: Any, **where: Any) -> Any:
    with model.trace("Hello <|mask|> world", **where):
        hidden = model.bert.encoder.layer[0].output.save()
        out = model.output.logits.save()
    return hidden, out


def encoded(model: Any, **where: Any) -> Any:
    with model.trace("Hello world", **where):
        hidden = model.encoder.layer[1].output.save()
        out = model.output.pooler_output.save()
    return hidden, out


async def test_an_encoder_whose_pooler_is_drawn(masked_bert: Path, tmp_path: Path) -> None:
    """A local run that begins from the same seed draws the same; the result names what was drawn."""
    torch.manual_seed(loading.SEED)
    models = {MASKS: local(masked_bert, MASKS)}
    torch.manual_seed(loading.SEED)
    models[FEATURES] = local(masked_bert, FEATURES)
    drawn = ["pooler.dense.weight", "pooler.dense.bias"]
    async with serving_tasks(masked_bert, tmp_path / "engine", models) as several:
        for task, block in ((MASKS, filled), (FEATURES, encoded)):
            service = several.services[task]
            reply = await service.send(block)
            hidden, out = block(service.model)
            assert torch.equal(reply.values["hidden"], hidden), task
            assert torch.equal(reply.values["out"], out), task
            lacks = drawn if task == FEATURES else None
            assert reply.saved.meta.get("random_weights") == lacks
        assert several.services[MASKS].info.random_weights == {FEATURES: drawn}
        single = sum(tensor.nbytes for tensor in models[MASKS]._module.parameters())
        assert several.weights_bytes < 1.2 * single


# -- an encoder-decoder ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tiny_t5: Path) -> Any:
    """As nnsight takes one that writes: a loaded module."""
    module = AutoModelForSeq2SeqLM.from_pretrained(str(tiny_t5))
    return TransformersModel(module, task=GENERATION)


@pytest.fixture
def described_t5(tiny_t5: Path) -> Any:
    """The same without weights, for a client that has no room for them."""
    with torch.device("meta"):
        module = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(str(tiny_t5)))
    return TransformersModel(module, task=GENERATION, device="meta")


def written(model: Any, **where: Any) -> Any:
    with model.generate("Hello world", min_new_tokens=4, max_new_tokens=4, **where) as tracer:
        hidden = model.encoder.block[0].output[0].save()
        for _ in tracer.iter[1:3]:
            model.decoder.block[1].output[0][:] += 1
        out = tracer.result.save()
    return hidden, out


def forward(model: Any, **where: Any) -> Any:
    target = model.tokenizer("Hallo", return_tensors="pt")["input_ids"]
    with model.trace("Hello world", decoder_input_ids=target, **where):
        hidden = model.decoder.block[1].output[0].save()
        out = model.lm_head.output.save()
    return hidden, out


def both_stacks(model: Any, **where: Any) -> Any:
    tokens = model.tokenizer("Hello world", return_tensors="pt")
    with model.trace({**tokens, "decoder_input_ids": tokens["input_ids"]}, **where):
        hidden = model.encoder.block[0].output[0].save()
        out = model.output.last_hidden_state.save()
    return hidden, out


async def test_an_encoder_decoder(
    tiny_t5: Path, t5: Any, described_t5: Any, tmp_path: Path
) -> None:
    models = {FEATURES: local(tiny_t5, FEATURES), GENERATION: t5}
    async with serving_tasks(tiny_t5, tmp_path / "engine", models) as several:
        generation = several.services[GENERATION]
        without = replace(generation, model=described_t5)
        cases = (
            (several.services[FEATURES], several.services[FEATURES].model, both_stacks),
            (generation, t5, written),
            (generation, t5, forward),
            (without, t5, written),
        )
        for service, here, block in cases:
            values = (await service.send(block)).values
            hidden, out = block(here)
            assert torch.equal(values["hidden"], hidden), block
            assert torch.equal(values["out"], out), block
        single = sum(tensor.nbytes for tensor in t5._module.parameters())
        assert several.weights_bytes < 1.2 * single
