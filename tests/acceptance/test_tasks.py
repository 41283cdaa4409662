"""Several tasks of one model at unmodified clients: a language model, an encoder, an encoder-decoder.

Each deployment has one worker and one set of weights; who asks for one task has a client of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.operator import Unexpected
from edif_hpc.testing.stack import MODEL, Stack
from tests.acceptance.conftest import QUICK

BERT, T5 = "edif/masked-bert", "edif/tiny-t5"
DEPLOYED = {
    "gpt2": (MODEL, ["text-generation", "feature-extraction"]),
    "bert": (BERT, ["fill-mask", "feature-extraction"]),
    "t5": (T5, ["text-generation", "feature-extraction"]),
}
#: Runs the same block there and here, and compares all that it saves.
COMPARE = """
import torch, transformers
from nnsight import TransformersModel
transformers.logging.set_verbosity(transformers.logging.CRITICAL)

def compare(run, model, here):
    there, tracer = run(model, remote=True)
    local, _ = run(here)
    return {"equal": [torch.equal(*pair) for pair in zip(there, local)], "meta": tracer.backend.meta}
"""


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, masked_bert: Path, tiny_t5: Path
) -> Iterator[Stack]:
    """Three models, each with two tasks and one worker."""
    models = {MODEL: tiny_gpt2, BERT: masked_bert, T5: tiny_t5}
    with Stack(root=tmp_path_factory.mktemp("stack"), models=models, settings=QUICK) as running:
        for name, (repo_id, (task, *more)) in DEPLOYED.items():
            running.deploy(repo_id, name=name, task=task, more_tasks=more)
            running.launch(name)
        for name in DEPLOYED:
            running.wait_warm(name)
        yield running


def client(stack: Stack, name: str) -> ClientProcess:
    process = ClientProcess(stack.client_environ(stack.token(name)), stack.root / name)
    process.run(COMPARE)
    return process


@pytest.fixture(scope="module")
def writer(stack: Stack) -> Iterator[ClientProcess]:
    """Asks for text generation."""
    with client(stack, "ada") as process:
        yield process


@pytest.fixture(scope="module")
def reader(stack: Stack) -> Iterator[ClientProcess]:
    """Asks for features."""
    with client(stack, "grace") as process:
        yield process


def weights_bytes(stack: Stack, deployment: str) -> int:
    [worker] = stack.operator.workers(deployment)
    return int(worker["worker"]["weights_bytes"])


def test_two_clients_with_two_tasks_share_one_set_of_weights(
    stack: Stack, writer: ClientProcess, reader: ClientProcess
) -> None:
    generation = f"""
        model = TransformersModel({MODEL!r}, task="text-generation")
        here = TransformersModel({MODEL!r}, task="text-generation", dispatch=True)
        def run(m, **where):
            with m.trace("The Eiffel Tower is in", **where) as tracer:
                hidden = m.transformer.h[1].output.save()
                logits = m.lm_head.output.save()
            return (hidden, logits), tracer
        report(**compare(run, model, here))
        report(size=sum(each.nbytes for each in here._module.parameters()))
    """
    features = f"""
        model = TransformersModel({MODEL!r}, task="feature-extraction")
        here = TransformersModel({MODEL!r}, task="feature-extraction", dispatch=True)
        def run(m, **where):
            with m.trace("The Eiffel Tower is in", **where) as tracer:
                hidden = m.h[1].output.save()
                last = m.output.last_hidden_state.save()
            return (hidden, last), tracer
        report(**compare(run, model, here))
    """
    writer.start(generation)
    reader.start(features)
    told, also = writer.wait(), reader.wait()
    assert told["equal"] == also["equal"] == [True, True]
    assert also["meta"]["model_key"].endswith('"task": "feature-extraction"}')
    assert told["size"] <= weights_bytes(stack, "gpt2") < 1.2 * told["size"]


def test_a_task_that_is_not_deployed_is_refused_with_those_that_are(
    stack: Stack, reader: ClientProcess
) -> None:
    with pytest.raises(CellFailed) as refused:
        reader.run(f"""
            other = TransformersModel({MODEL!r}, task="text-classification")
            with other.trace("Hello", remote=True):
                out = other.output.save()
        """)
    assert f"{MODEL} (tasks text-generation and feature-extraction)" in refused.value.text
    with pytest.raises(
        Unexpected, match=r"gpt2 serves edif/tiny-gpt2 \(task feature-extraction\) already"
    ):
        stack.deploy(MODEL, name="second", task="fill-mask", more_tasks=["feature-extraction"])


def test_status_tells_each_task(writer: ClientProcess) -> None:
    told = writer.run(f"""
        import nnsight
        report(
            listed=sorted(nnsight.status()),
            running=[nnsight.is_model_running({MODEL!r}, task=each) for each in
                     ("text-generation", "feature-extraction", "fill-mask")],
        )
    """)
    assert f"{MODEL} (feature-extraction)" in told["listed"]
    assert told["running"] == [True, True, False]


def test_an_encoder_fills_masks_and_gives_features(
    stack: Stack, writer: ClientProcess, reader: ClientProcess
) -> None:
    """Its checkpoint has no pooler, so that of the features is drawn: from a seed that is the same at home."""
    told = writer.run(f"""
        bert = TransformersModel({BERT!r}, task="fill-mask")
        bert_here = TransformersModel({BERT!r}, task="fill-mask", dispatch=True)
        def run(m, **where):
            with m.trace("Hello <|mask|> world", **where) as tracer:
                hidden = m.bert.encoder.layer[0].output.save()
                logits = m.output.logits.save()
            return (hidden, logits), tracer
        report(**compare(run, bert, bert_here))
        report(size=sum(each.nbytes for each in bert_here._module.parameters()))
    """)
    assert told["equal"] == [True, True]
    assert "random_weights" not in told["meta"]
    assert weights_bytes(stack, "bert") < 1.2 * told["size"]
    told = reader.run(f"""
        torch.manual_seed(0)
        bert_here = TransformersModel({BERT!r}, task="feature-extraction", dispatch=True)
        bert = TransformersModel({BERT!r}, task="feature-extraction")
        def run(m, **where):
            with m.trace("Hello world", **where) as tracer:
                hidden = m.encoder.layer[1].output.save()
                pooled = m.output.pooler_output.save()
            return (hidden, pooled), tracer
        report(**compare(run, bert, bert_here))
    """)
    assert told["equal"] == [True, True]
    assert told["meta"]["random_weights"] == ["pooler.dense.weight", "pooler.dense.bias"]


def test_an_encoder_decoder_writes(stack: Stack, writer: ClientProcess) -> None:
    """With and without weights on the client's side."""
    told = writer.run(f"""
        from transformers import AutoConfig, AutoModelForSeq2SeqLM
        loaded = AutoModelForSeq2SeqLM.from_pretrained({T5!r})
        with torch.device("meta"):
            described = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained({T5!r}))
        t5_here = TransformersModel(loaded, task="text-generation")
        t5 = TransformersModel(described, task="text-generation", device="meta")
        def run(m, **where):
            with m.generate("Hello world", min_new_tokens=4, max_new_tokens=4, **where) as tracer:
                hidden = m.encoder.block[0].output[0].save()
                for _ in tracer.iter[1:3]:
                    m.decoder.block[1].output[0][:] += 1
                written = tracer.result.save()
            return (hidden, written), tracer
        report(**compare(run, t5, t5_here))
        with_weights = run(t5_here, remote=True)[0]
        report(again=[torch.equal(*pair) for pair in zip(with_weights, run(t5_here)[0])],
               size=sum(each.nbytes for each in loaded.parameters()))
    """)
    assert told["equal"] == told["again"] == [True, True]
    assert told["meta"]["gradients"] is True, "its fused attention would round otherwise"
    assert weights_bytes(stack, "t5") < 1.2 * told["size"]


def test_an_encoder_decoder_gives_features(reader: ClientProcess) -> None:
    told = reader.run(f"""
        t5 = TransformersModel({T5!r}, task="feature-extraction")
        t5_here = TransformersModel({T5!r}, task="feature-extraction", dispatch=True)
        def run(m, **where):
            tokens = m.tokenizer("Hello world", return_tensors="pt")
            with m.trace({{**tokens, "decoder_input_ids": tokens["input_ids"]}}, **where) as tracer:
                hidden = m.encoder.block[0].output[0].save()
                last = m.output.last_hidden_state.save()
            return (hidden, last), tracer
        report(**compare(run, t5, t5_here))
    """)
    assert told["equal"] == [True, True]
