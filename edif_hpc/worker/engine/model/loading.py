"""Loading the models of a deployment, each exactly as a researcher's own process would.

The wrapper comes from nnsight (`Remotable.from_model_key`), so modules, attention and tokenizer are
those of a plain local load in the same dtype. The key names the class to import, and keys come from
clients: only listed classes are taken. The files are in a folder on this machine, always: whatever
had to be fetched was fetched before.

A task decides the class that is built over a checkpoint, and with it what has to be in the checkpoint.
What is missing there, transformers draws at random, which a warning tells to whoever loads it at home.
Here nobody would see that, and each worker would draw other numbers. So a task whose model lacks weights
is refused. One thing may lack: the pooler of an encoder, which many checkpoints come without and hidden
states do not need. It is drawn from one seed everywhere, and every result names it.

Encoder-decoders that write text (T5 and its like) are no causal language models, and that is what the
pipeline of `text-generation` looks for: nnsight takes them only as a loaded module that it wraps. That is
done here too.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import get_local_env
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
)

from edif_hpc.domain.deployment import DEFAULT_TASK, ModelKey, parse_model_key
from edif_hpc.errors import SettingsError
from edif_hpc.worker.engine.messages import Load

#: What weights that a checkpoint may lack are drawn from.
SEED = 0
_NAMED = 5


def be_one_thread() -> None:
    """Keep tqdm from starting its watching thread: the zygote must be able to make namespaces."""
    tqdm.monitor_interval = 0


def import_peft(load: Load) -> None:
    """Import what attaches adapters, if there are any: executors would each take seconds for it.

    Raises:
        SettingsError: it is not installed.
    """
    if not load.adapters:
        return
    try:
        importlib.import_module("peft.functional")
    except ImportError as error:
        raise SettingsError(
            f"this deployment lists adapters ({', '.join(load.adapters)}), and peft, which attaches them, cannot be "
            f"imported on the worker ({error}); there, run: pip install peft"
        ) from error


def load_models(load: Load) -> Iterator[tuple[ModelKey, Any]]:
    """Yield each task's key and nnsight wrapper with its weights.

    The next one is loaded when it is asked for, so that the one before can be put away first.

    Raises:
        InvalidInput: the key names a class that is not served.
        SettingsError: the dtype is none, or the checkpoint lacks weights for a task.
    """
    first = parse_model_key(load.model_key)
    for task in (first.task, *load.more_tasks):
        torch.manual_seed(SEED)
        model = _load(replace(first, repo_id=load.folder, revision=None, task=task), load.dtype)
        _check_weights(model, task)
        _name(model, first.repo_id)
        yield replace(first, task=task), model


def random_weights(model: Any) -> list[str]:
    """Return the names of parameters that the checkpoint lacks, so that transformers drew them."""
    module = model._module  # noqa: SLF001 - as nnsight's own helpers do
    known = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()  # set by rule
    return [
        name
        for name, parameter in module.named_parameters()
        if not getattr(parameter, "_is_hf_initialized", False)
        and not any(re.search(pattern, name) for pattern in known)
    ]


def readable(load: Load) -> set[Path]:
    """Return where the files really are: a hub's snapshot is a folder of links."""
    folders = [Path(each) for each in (load.folder, *load.adapters.values())]
    links = {file.resolve().parent for folder in folders for file in folder.iterdir()}
    return {folder.resolve() for folder in folders} | links


def describe(models: Mapping[str, Any], load: Load) -> dict[str, Any]:
    """Return the part of `EngineInfo` that only this side can know; `models` are by task."""
    first = next(iter(models.values()))
    persistent = first._remoteable_persistent_objects()  # noqa: SLF001 - nnsight's server API
    drawn = {task: random_weights(model) for task, model in models.items()}
    return {
        "commit": load.commit,
        "adapters": {name: Path(folder).name for name, folder in load.adapters.items()},
        "dtype": str(next(first._module.parameters()).dtype).removeprefix("torch."),  # noqa: SLF001
        "tasks": {task: type(model._module).__name__ for task, model in models.items()},  # noqa: SLF001
        "random_weights": {task: names for task, names in drawn.items() if names},
        "persistent": sorted(k for k in persistent if not k.startswith("Module:")),
        "attn_implementation": first.attn_implementation,
        "python_version": sys.version,
        "packages": packages(load.libraries),
    }


def packages(libraries: Iterable[str]) -> dict[str, str]:
    """Return the versions that are imported here, by import name; what was not installed has none and is left out."""
    added, path = set(libraries), sys.path[:]
    found: dict[str, str] = get_local_env()["packages"]
    if added:  # of what both have, the image's own is imported
        sys.path[:] = [each for each in path if each not in added]
        try:
            found = found | get_local_env()["packages"]
        finally:
            sys.path[:] = path
    return {name: version for name, version in found.items() if version != "local"}


def _load(key: ModelKey, dtype: str) -> Any:
    if key.task == DEFAULT_TASK and _writes_from_an_encoder(key):
        # It complains at length of the class that is wrapped here on purpose.
        logging.getLogger("transformers.pipelines.base").setLevel(logging.CRITICAL)
        module = AutoModelForSeq2SeqLM.from_pretrained(key.repo_id, **_dtype(dtype))
        return TransformersModel(module, task=key.task)
    return Remotable.from_model_key(key.render(), dispatch=True, **_dtype(dtype))


def _name(model: Any, repo_id: str) -> None:
    """Let what shows where it was loaded from show what a researcher loads, not a folder of this machine."""
    module = model._module  # noqa: SLF001 - as nnsight's own helpers do
    module.config._name_or_path = module.name_or_path = repo_id  # noqa: SLF001 - transformers' name for it
    if model.tokenizer is not None:
        model.tokenizer.name_or_path = repo_id


def _writes_from_an_encoder(key: ModelKey) -> bool:
    """Whether it is an encoder-decoder that has no class of a causal language model."""
    config = AutoConfig.from_pretrained(key.repo_id, trust_remote_code=key.trust_remote_code)
    causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    writes = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    return writes and not causal and bool(config.is_encoder_decoder)


def _check_weights(model: Any, task: str) -> None:
    lacking = [name for name in random_weights(model) if "pooler" not in name.split(".")]
    if lacking:
        more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
        raise SettingsError(
            f"the checkpoint has no weights for {', '.join(lacking[:_NAMED])}{more}, which {type(model._module).__name__}, "  # noqa: SLF001
            f"the model of the task {task}, needs; they would be random numbers, other ones than those of a local run. "
            f"Deploy it without --task {task}, or from a checkpoint that was trained for it"
        )


def _dtype(name: str) -> dict[str, Any]:
    if name == "auto":
        return {}
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SettingsError(
            f"dtype {name!r} is not a torch dtype; for example float32, bfloat16, auto"
        )
    return {"dtype": dtype}
