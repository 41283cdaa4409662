"""Running a request so that its numbers are those of a local run.

The tracer that the client serialised is rebuilt and executed against this process's model, in a process
that ran nothing before: nnsight's caches by file name are empty, the random state is fresh, and edits,
adapters and gradients of others cannot exist.

Bits are equal for equal numbers of compute threads, which `meta` therefore tells.

* **Attention** is set as the client resolved it, if it is one that ships with transformers: any other
  name would make transformers fetch code from a hub.
* **Gradients** are tracked, as they are locally, when anything in the request speaks of them; otherwise
  `no_grad` saves the memory of a graph that nobody walks. Never `inference_mode`, which forbids more,
  and never autocast, which changes numbers.
* **Errors** point at the researcher's line, with its source; frames of nnsight and ours are left out.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import nnsight
import nnsight.tracing.tracer as scopes
import torch
import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing.util import filter_traceback

from edif_hpc.errors import InvalidInput, NotPermitted
from edif_hpc.worker.engine import saves
from edif_hpc.worker.engine.values import FailureKind

#: Implementations that are part of transformers itself.
ATTENTION = frozenset({"eager", "sdpa", "flex_attention"})
MESSAGE_CHARACTERS = 16 * 1024

_GRADIENTS = re.compile(rb"grad|backward")
_OURS = (str(Path(nnsight.__file__).parent), str(Path(__file__).parent), "<frozen runpy>")
_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


def apply_env(model: Any, env: Mapping[str, Any]) -> None:
    """Put the client's per-request settings in force.

    Raises:
        NotPermitted: a setting, or its value, is not on the list.
    """
    unknown = set(env) - {"attn_implementation", "peft"}
    if unknown:
        raise NotPermitted(f"this server does not know the request settings {sorted(unknown)}")
    if env.get("peft") is not None:
        raise NotPermitted(f"the PEFT adapter {env['peft']!r} is not served by this deployment")
    wanted = env.get("attn_implementation")
    if wanted is not None and wanted != model.attn_implementation and wanted not in ATTENTION:
        raise NotPermitted(
            f"attention implementation {wanted!r} is not served; choose of {sorted(ATTENTION)}"
        )
    model._remoteable_set_env(dict(env))  # noqa: SLF001 - nnsight's server API


def unpack(blob: bytes, *, compress: bool) -> bytes:
    """Return the payload of a client's blob."""
    try:
        return zstandard.ZstdDecompressor().decompress(blob) if compress else blob
    except zstandard.ZstdError as error:
        raise InvalidInput(
            f"the request cannot be read: it says that it is compressed, but {error}; "
            "send it with an unmodified nnsight"
        ) from error


def wants_gradients(payload: bytes) -> bool:
    """Whether anything that the request carries as source speaks of gradients.

    Blocks and functions travel as source inside the payload, also those of the researcher's own
    modules, so looking at the bytes sees them all. Finding too much only costs memory.
    """
    return _GRADIENTS.search(payload) is not None


def execute(model: Any, payload: bytes) -> dict[str, Any]:
    """Run the request; return what the client is to get, by name."""
    persistent = model._remoteable_persistent_objects()  # noqa: SLF001 - nnsight's server API
    tracer = RequestModel.deserialize(payload, persistent, compress=False)
    scopes.inc()
    try:
        with torch.set_grad_enabled(wants_gradients(payload)):
            tracer.execute(tracer.info.code)
        return saves.collect(tracer.info.frame.f_locals, scopes._saves())  # noqa: SLF001
    finally:
        scopes.dec()


def judge(error: BaseException) -> FailureKind:
    """Tell what kind of failure an exception in the request is."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return FailureKind.OOM
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
        return FailureKind.OOM
    return FailureKind.USER


def explain(error: BaseException) -> str:
    """Return the traceback as the researcher would want to see it."""
    for one in _chain(error):
        one.__traceback__ = _cleaned(one)
    text = "".join(traceback.format_exception(error)).rstrip()
    if len(text) > MESSAGE_CHARACTERS:
        half = MESSAGE_CHARACTERS // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return text


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and those that led to it, each once."""
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            todo += [one.__cause__, one.__context__]


def _cleaned(error: BaseException) -> TracebackType | None:
    # nnsight keeps the part of the traceback that lies in the block, before the model's frames pile up.
    inner = getattr(error, "__intervention_tb__", error.__traceback__)
    cleaned: TracebackType | None = filter_traceback(
        inner, lambda frame: not frame.f_code.co_filename.startswith(_OURS)
    )
    return cleaned
