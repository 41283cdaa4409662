"""An adapter at an unmodified client: `TransformersModel(..., peft="org/name")` is all that a researcher writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.hub import Repo
from edif_hpc.testing.stack import MODEL, Stack
from tests.acceptance.conftest import QUICK

ADAPTER, UNLISTED = "lab/tiny-lora", "lab/unlisted"


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_lora: Path
) -> Iterator[Stack]:
    """A worker that serves the model with one of two adapters that the hub has."""
    models = {MODEL: tiny_gpt2, ADAPTER: tiny_lora, UNLISTED: tiny_lora}
    with Stack(root=tmp_path_factory.mktemp("stack"), models=models, settings=QUICK) as running:
        pinned = {"repo_id": ADAPTER, "revision": Repo.read(ADAPTER, tiny_lora).commit}
        running.deploy(adapters=[pinned])
        running.launch()
        running.wait_warm()
        yield running


@pytest.fixture(scope="module")
def client(stack: Stack) -> Iterator[ClientProcess]:
    """The model with its adapter, remote (without weights) and local."""
    with ClientProcess(stack.client_environ(stack.token("ada")), stack.root / "ada") as process:
        process.run(f"""
            import torch
            from nnsight import TransformersModel
            model = TransformersModel({MODEL!r}, task="text-generation", peft={ADAPTER!r})
            here = TransformersModel({MODEL!r}, task="text-generation", peft={ADAPTER!r}, dispatch=True)
            plain = TransformersModel({MODEL!r}, task="text-generation")
            plain_here = TransformersModel({MODEL!r}, task="text-generation", dispatch=True)
        """)
        yield process


def test_a_trace_has_the_numbers_of_a_local_one(client: ClientProcess, tiny_lora: Path) -> None:
    told = client.run("""
        def run(m, **where):
            with m.trace("The Eiffel Tower is in", **where) as tracer:
                down = m.transformer.h[1].attn.c_attn.lora_A.default.output.save()
                logits = m.lm_head.output.save()
            return down, logits, tracer
        *there, tracer = run(model, remote=True)
        *local, _ = run(here)
        report(equal=[torch.equal(*pair) for pair in zip(there, local)], meta=tracer.backend.meta)
    """)
    assert told["equal"] == [True, True]
    commit = Repo.read(ADAPTER, tiny_lora).commit
    assert told["meta"]["adapter"] == {"repo_id": ADAPTER, "commit": commit}


def test_a_backward_has_the_numbers_of_a_local_one(client: ClientProcess) -> None:
    told = client.run("""
        def run(m, **where):
            with m.trace("gradients flow", **where):
                hidden = m.transformer.h[0].output
                hidden.requires_grad_(True)
                with m.lm_head.output.sum().backward():
                    gradient = hidden.grad.save()
            return gradient
        there, local = run(model, remote=True), run(here)
        report(equal=torch.equal(there, local), nonzero=bool(local.abs().sum() > 0))
    """)
    assert (told["equal"], told["nonzero"]) == (True, True)


def test_requests_with_and_without_it_do_not_touch_each_other(client: ClientProcess) -> None:
    told = client.run("""
        def run(m, **where):
            with m.trace("one and the other", **where):
                logits = m.lm_head.output.save()
            return logits
        with_adapter, without = run(here), run(plain_here)
        equal = []
        for _ in range(3):
            equal.append(torch.equal(run(model, remote=True), with_adapter))
            equal.append(torch.equal(run(plain, remote=True), without))
        report(equal=equal, differ=not torch.equal(with_adapter, without))
    """)
    assert (told["equal"], told["differ"]) == ([True] * 6, True)


def test_an_adapter_that_is_not_listed_is_refused_at_the_door(client: ClientProcess) -> None:
    with pytest.raises(CellFailed) as refused:
        client.run(f"""
            other = TransformersModel({MODEL!r}, task="text-generation", peft={UNLISTED!r})
            with other.trace("Hello", remote=True):
                logits = other.lm_head.output.save()
        """)
    assert refused.value.error == "RemoteError"
    assert f"'{UNLISTED}' is not served with this model; served: {ADAPTER}" in refused.value.text


def test_attention_that_is_not_served_is_refused_at_the_door(client: ClientProcess) -> None:
    with pytest.raises(CellFailed) as refused:
        client.run("""
            plain._module.config._attn_implementation = "flex_attention"
            try:
                with plain.trace("Hello", remote=True):
                    logits = plain.lm_head.output.save()
            finally:
                plain._module.config._attn_implementation = "sdpa"
        """)
    assert "use one of: eager, sdpa" in refused.value.text
