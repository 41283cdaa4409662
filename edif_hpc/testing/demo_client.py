"""The researcher's side of the demo: ordinary nnsight code, run once here and once at the relay.

    NDIF_HOST=http://127.0.0.1:8710 NDIF_API_KEY=edif_... python -m edif_hpc.testing.demo_client

Each experiment below is what a researcher writes, with `remote` as the only difference. nnsight is the one from the package
index, and it learns of the relay from its own two variables. What the relay sends back must be what a run in this process
gives, bit for bit; one value that differs makes the exit code 1.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click
import torch
from nnsight.modeling.transformers import TransformersModel

MODEL = "edif/tiny-gpt2"
PROMPT = "The relay decides and remembers"
OTHER_PROMPT = "The worker decides and remembers"
NEW_TOKENS = 8
POSITIONS = 512
BATCH = 24  # of 512 positions and 1,024 words: 50 MB of logits

Values = Mapping[str, torch.Tensor]
Experiments = Sequence[tuple[str, Callable[..., Values]]]


def trace(model: Any, *, remote: bool) -> Values:
    """Read what a layer computes, and the model's next word."""
    with model.trace(PROMPT, remote=remote):
        hidden = model.transformer.h[1].output.save()
        logits = model.lm_head.output[:, -1].save()
    return {"hidden states of layer 1": hidden, "logits": logits}


def patching(model: Any, *, remote: bool) -> Values:
    """Carry an activation of one prompt into the run of another, both in one request."""
    with model.session(remote=remote):
        with model.trace(PROMPT):
            clean = model.transformer.h[0].output[:, -1]
        with model.trace(OTHER_PROMPT):
            model.transformer.h[0].output[:, -1] = clean
            patched = model.lm_head.output[:, -1].save()
    return {"logits of the patched run": patched}


def generation(model: Any, *, remote: bool) -> Values:
    """Generate while one layer's MLP is silenced at every step."""
    with model.generate(
        PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False, remote=remote
    ) as tracer:
        for _ in tracer.iter[0:NEW_TOKENS]:
            model.transformer.h[1].mlp.output[:] = 0
        tokens = tracer.result.save()
    return {"generated tokens": tokens}


def large(model: Any, *, remote: bool) -> Values:
    """Bring 50 MB home: the logits of a whole batch."""
    prompts = torch.arange(BATCH * POSITIONS).reshape(BATCH, POSITIONS) % 1000
    with model.trace(prompts, remote=remote):
        logits = model.lm_head.output.save()
    return {"logits of a batch": logits}


EXPERIMENTS: Experiments = (
    ("a trace", trace),
    ("a session with activation patching", patching),
    ("a generation with an intervention", generation),
    ("a large result", large),
)


def compare(here: Values, there: Values) -> list[tuple[str, bool]]:
    """One line for each value, and whether both runs gave the same bits."""
    lines = []
    for name, mine in here.items():
        other = there[name]
        equal = mine.dtype == other.dtype and torch.equal(mine, other)
        seen = "equal, bit for bit" if equal else f"DIFFERS, by up to {_distance(mine, other)}"
        lines.append(
            (f"{name} {tuple(mine.shape)}: here {_few(mine)}, remote {_few(other)}: {seen}", equal)
        )
    return lines


def _few(values: torch.Tensor) -> str:
    """The last few numbers; of the last position, they depend on all that came before."""
    numbers = values.flatten()[-3:].tolist()
    return "[… " + " ".join(f"{each:g}" for each in numbers) + "]"


def _distance(mine: torch.Tensor, other: torch.Tensor) -> str:
    if mine.shape != other.shape or mine.dtype != other.dtype:
        return f"{tuple(mine.shape)} {mine.dtype} against {tuple(other.shape)} {other.dtype}"
    return f"{(mine - other).abs().max().item():g}"


def run_all(remote_model: Any, local_model: Any, experiments: Experiments = EXPERIMENTS) -> int:
    """Run experiments in both places and say what came out; returns how many values differ."""
    wrong = 0
    for title, run in experiments:
        click.echo(f"-- {title}: {run.__doc__}")
        began = time.monotonic()
        there = run(remote_model, remote=True)
        took_s = time.monotonic() - began
        for line, equal in compare(run(local_model, remote=False), there):
            click.echo(f"   {line}")
            wrong += not equal
        count = sum(each.numel() * each.element_size() for each in there.values())
        click.echo(f"   {count / 1e6:.3g} MB came back in {took_s:.2f} s")
    click.echo(f"{wrong} value(s) DIFFER" if wrong else "all values are those of a local run")
    return wrong


def main() -> int:
    """Run all experiments; 1 if any value differs."""
    remote_model = TransformersModel(MODEL, task="text-generation")  # no weights on this side
    local_model = TransformersModel(MODEL, task="text-generation", dispatch=True)
    return 1 if run_all(remote_model, local_model) else 0


if __name__ == "__main__":
    sys.exit(main())
