"""Running a request so that its numbers are those of a local run.

The tracer that the client serialised is rebuilt and executed against this process's model, in a process
that ran nothing before: nnsight's caches by file name are empty, the random state is fresh, and edits,
adapters and gradients of others cannot exist.

Bits are equal for equal numbers of compute threads, which `meta` therefore tells.

* **Attention** is set as the client resolved it, if it is one that ships with transformers: any other
  name would make transformers fetch code from a hub.
* **Adapters** are attached by nnsight itself, from the folder that was fetched; only listed ones are.
* **Gradients** are tracked, as they are locally, when anything in the request speaks of them; otherwise
  `no_grad` saves the memory of a graph that nobody walks. A request that fails for want of them is told
  apart, so that it can run again with them (`rerun`); so is one that wrote into a weight, which torch
  may refuse where they are tracked. Never `inference_mode`, which forbids more, and
  never autocast, which changes numbers.
* **Operations** inside a forward (`.source`) can be read once the forward is instrumented. Locally a
  researcher does that by touching `.source` before the trace, which the request does not tell: so when
  it speaks of `.source`, every forward is.
* **Errors** point at the researcher's line, with its source; frames of nnsight and ours are left out.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import nnsight
import nnsight.tracing.tracer as scopes
import torch
import zstandard
from nnsight.intervention.serialization import UnknownPersistentIdError
from nnsight.intervention.source import SourceNotAvailable, install_source
from nnsight.schema.request import RequestModel
from nnsight.tracing.util import filter_traceback

from edif_hpc.domain.deployment import ALLOWED_ATTENTION
from edif_hpc.errors import InvalidInput, NotPermitted
from edif_hpc.worker.engine.request import captured, classes
from edif_hpc.worker.engine.values import FailureKind, Plain

MESSAGE_CHARACTERS = 16 * 1024

#: Words of gradients; not the attributes that every `torch.nn.Module` has and is pickled with.
_GRADIENTS = re.compile(rb"grad|(?<!_is_full_)backward(?!_hooks|_pre_hooks)")
#: What torch and nnsight say when asked to go back through a graph that was not kept.
_LACKED = re.compile(r"(?:not|n't) require grad|can't retain_grad")
_OURS = (str(Path(nnsight.__file__).parent), str(Path(__file__).parents[1]), "<frozen runpy>")
_STAYS = (
    "[edif] {place}: what was saved there is not sent home, since nnsight's client takes only names of the function "
    "or script that its `with` stands in; save it under such a name, and put it there after the block\n"
)
_NO_MEMORY = ("can't allocate memory", "out of memory", "Cannot allocate memory")


class WroteWeights(Exception):
    """A request wrote into a weight in place, and no gradients were tracked.

    Where they are, torch refuses some of these writes and allows others (within `torch.no_grad()`, say); where they are
    not, it allows all. So the request runs again with them, and torch says what it says locally.
    """


def apply_env(model: Any, env: Mapping[str, Any], adapters: Mapping[str, str]) -> dict[str, Plain]:
    """Put the client's per-request settings in force; return what the result tells of them.

    `adapters` are those served, with the folder of each. It is nnsight that attaches one, as it does
    locally. That draws random numbers, for weights which the adapter's own then replace: the request
    must not see its generator moved.

    Raises:
        NotPermitted: a setting, or its value, is not on the list.
    """
    unknown = set(env) - {"attn_implementation", "peft"}
    if unknown:
        raise NotPermitted(f"this server does not know the request settings {sorted(unknown)}")
    adapter = env.get("peft")
    if adapter is not None and adapter not in [*adapters]:
        raise NotPermitted(
            f"the PEFT adapter {adapter!r} is not served; choose of {sorted(adapters)}"
        )
    wanted = env.get("attn_implementation")
    own = wanted is None or wanted == model.attn_implementation
    if not own and wanted not in ALLOWED_ATTENTION:
        raise NotPermitted(
            f"attention implementation {wanted!r} is not served; choose of {sorted(ALLOWED_ATTENTION)}"
        )
    if adapter is None:
        model._remoteable_set_env(dict(env))  # noqa: SLF001 - nnsight's server API
        return {"attn_implementation": model.attn_implementation}
    with torch.random.fork_rng(devices=[]):  # the replaced weights are drawn on the CPU
        model._remoteable_set_env({**env, "peft": adapters[adapter]})  # noqa: SLF001 - see above
    commit = Path(adapters[adapter]).name
    return {
        "attn_implementation": model.attn_implementation,
        "adapter": {"repo_id": adapter, "commit": commit},
    }


def unpack(blob: bytes, *, compress: bool) -> bytes:
    """Return the payload of a client's blob."""
    try:
        return zstandard.ZstdDecompressor().decompress(blob) if compress else blob
    except zstandard.ZstdError as error:
        raise InvalidInput(
            f"the request cannot be read: it says that it is compressed, but {error}; "
            "send it with an unmodified nnsight"
        ) from error


def restore(model: Any, payload: bytes) -> Any:
    """Return the client's tracer, bound to the modules of `model`.

    Raises:
        InvalidInput: the request refers to a module that this model does not have.
    """
    if b".source" in payload:
        _instrument(model)
    persistent = model._remoteable_persistent_objects()  # noqa: SLF001 - nnsight's server API
    try:
        return RequestModel.deserialize(
            payload, persistent, compress=False, unpickler=classes.Unpickler
        )
    except UnknownPersistentIdError as error:
        raise InvalidInput(
            f"the request refers to {error}, which the model served here does not have. nnsight sends a "
            "module that was attached to the model by its name alone: keep it in a variable instead, "
            "which is sent as it is, and call that in the block"
        ) from error


def _instrument(model: Any) -> None:
    for envoy in model.modules():
        with suppress(SourceNotAvailable):  # asking for this one's source then says so
            install_source(envoy)


def wants_gradients(payload: bytes, tracer: Any) -> bool:
    """Whether anything that the request carries as source speaks of gradients.

    Blocks and functions travel as source inside the payload, also those of the researcher's own
    modules, so looking at the bytes sees them all. Finding too much only costs memory; but the name of
    the researcher's folder or script (`/home/grad7/`) says nothing of the request.
    """
    script: str = tracer.info.frame.f_code.co_filename
    folder = script.rpartition("/")[0] + "/"
    for name in (script.encode(), folder.encode()):
        if name.startswith(b"/") and _GRADIENTS.search(name):
            payload = payload.replace(name, b"")
    return _GRADIENTS.search(payload) is not None


def lacked_gradients(error: BaseException) -> bool:
    """Whether an exception in the request, or one that led to it, is for want of gradients."""
    return any(
        isinstance(one, WroteWeights)
        or (isinstance(one, RuntimeError) and _LACKED.search(str(one)) is not None)
        for one in chain(error)
    )


def execute(
    model: Any,
    tracer: Any,
    *,
    gradients: bool,
    failed: Callable[[BaseException, set[int]], None] = lambda _, __: None,
) -> dict[str, Any]:
    """Run the request; return what the client is to get, by name.

    An exception on its way is shown to `failed`, with the ids of what was saved.

    Raises:
        WroteWeights: it did, and no gradients were tracked.
    """
    frame = tracer.info.frame
    before = captured.before(frame.f_locals)
    scopes.inc()
    try:
        with torch.set_grad_enabled(gradients), _weights_watched(model, gradients=gradients):
            tracer.execute(tracer.info.code)
        saved = scopes._saves()  # noqa: SLF001
        for place in captured.stranded(frame.f_locals, frame.f_globals, saved):
            sys.stderr.write(_STAYS.format(place=place))
        return captured.collect(frame.f_locals, saved, before)
    except BaseException as error:
        failed(error, scopes._saves())  # noqa: SLF001
        raise
    finally:
        scopes.dec()


@contextmanager
def _weights_watched(model: Any, *, gradients: bool) -> Iterator[None]:
    """End a run that wrote into weights in place, as torch counts it, if gradients are not tracked."""

    def versions() -> list[int]:
        parameters = model._module.parameters()  # noqa: SLF001 - as nnsight's own helpers do
        return [each._version for each in parameters if each.requires_grad]  # noqa: SLF001 - torch's name

    before = [] if gradients else versions()
    try:
        yield
    finally:
        if not gradients and versions() != before:
            raise WroteWeights("the request wrote into weights while no gradients were tracked")


def judge(error: BaseException) -> FailureKind:
    """Tell what kind of failure an exception in the request is."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return FailureKind.OOM
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY):
        return FailureKind.OOM
    return FailureKind.USER


def explain(error: BaseException) -> str:
    """Return the traceback as the researcher would want to see it."""
    for one in chain(error):
        one.__traceback__ = _cleaned(one)
    text = "".join(traceback.format_exception(error)).rstrip()
    if len(text) > MESSAGE_CHARACTERS:
        half = MESSAGE_CHARACTERS // 2
        text = f"{text[:half]}\n[...]\n{text[-half:]}"
    return text


def chain(error: BaseException) -> Iterator[BaseException]:
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
