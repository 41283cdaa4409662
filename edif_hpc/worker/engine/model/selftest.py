"""The request that every engine runs first: written here, captured as a client would, run by nobody yet.

It has two uses. The pool sends it through an executor by the very path of a request before the worker
reports itself warm. And each executor runs it once before it is ready, so that the first forward, with
all that it sets up, is not part of anybody's request. Capturing a block computes nothing, which is why
the zygote may do it.
"""

from __future__ import annotations

from typing import Any

import nnsight
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend


class Capture(Backend):  # type: ignore[misc]
    """A backend that keeps the blob instead of sending it."""

    def __init__(self) -> None:
        self.blob = b""

    def __call__(self, tracer: Any) -> None:
        """Serialise the block as the remote backend does, compressed."""
        self.blob = RequestModel.serialize(tracer, compress=True)


def capture(model: Any) -> bytes:
    """Return the blob of the self-test for `model`: one forward, where we know how to ask for one."""
    backend = Capture()
    if takes_text(model):
        with model.trace(_input(model), backend=backend):
            nnsight.save(model.output)
            _passed = nnsight.save([1])
    else:
        with model.session(backend=backend):
            _passed = nnsight.save([1])
    return backend.blob


def takes_text(model: Any) -> bool:
    """Whether one forward needs no more than a text: not a picture, not a sound."""
    module = model._module  # noqa: SLF001 - as nnsight's own helpers do
    takes_tokens = getattr(module, "main_input_name", "input_ids") == "input_ids"
    return takes_tokens and model.tokenizer is not None and model.processor is None


def tokens(model: Any, text: str) -> dict[str, Any]:
    """Return a text as the model's own forward takes it; what an encoder-decoder reads, it also writes."""
    encoded = dict(model.tokenizer(text, return_tensors="pt"))
    return encoded | ({"decoder_input_ids": encoded["input_ids"]} if _decodes(model) else {})


def _input(model: Any) -> Any:
    """A text as it is for a model that writes on; tokens for others, whose pipelines want more than a text."""
    writes_on = model._module.can_generate() and not _decodes(model)  # noqa: SLF001 - see above
    return "Hello" if writes_on else tokens(model, "Hello")


def _decodes(model: Any) -> bool:
    return bool(getattr(model._module.config, "is_encoder_decoder", False))  # noqa: SLF001 - see above
