"""Loading a model once, exactly as a researcher's own process would.

The wrapper comes from nnsight (`Remotable.from_model_key`), so modules, attention and tokenizer are
those of a plain local load in the same dtype. The key names the class to import, and keys come from
clients: only classes listed here are taken. The files are in a folder on this machine, always: whatever
had to be fetched was fetched before.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import get_local_env
from tqdm.auto import tqdm

from edif_hpc.errors import NotPermitted, SettingsError
from edif_hpc.worker.engine.messages import Load

CLASSES = (
    "nnsight.modeling.transformers.TransformersModel",
    "nnsight.modeling.language.LanguageModel",
    "nnsight.modeling.vlm.VisionLanguageModel",
)


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


def load_model(load: Load) -> Any:
    """Return the nnsight wrapper with its weights.

    Raises:
        NotPermitted: the key names a class that is not served.
        SettingsError: the dtype is none.
    """
    import_path, _, suffix = load.model_key.partition(":")
    if import_path not in CLASSES:
        raise NotPermitted(
            f"model class {import_path!r} is not served; known: {', '.join(CLASSES)}"
        )
    identity = {**json.loads(suffix), "repo_id": load.folder, "revision": None}
    key = f"{import_path}:{json.dumps(identity)}"
    return Remotable.from_model_key(key, dispatch=True, **_dtype(load.dtype))


def readable(load: Load) -> set[Path]:
    """Return where the files really are: a hub's snapshot is a folder of links."""
    folders = [Path(each) for each in (load.folder, *load.adapters.values())]
    links = {file.resolve().parent for folder in folders for file in folder.iterdir()}
    return {folder.resolve() for folder in folders} | links


def describe(model: Any, load: Load) -> dict[str, Any]:
    """Return the part of `EngineInfo` that only this side can know."""
    persistent = model._remoteable_persistent_objects()  # noqa: SLF001 - nnsight's server API
    packages = get_local_env()["packages"]
    return {
        "commit": load.commit,
        "adapters": {name: Path(folder).name for name, folder in load.adapters.items()},
        "dtype": str(next(model._module.parameters()).dtype).removeprefix("torch."),  # noqa: SLF001
        "model_class": type(model._module).__name__,  # noqa: SLF001
        "task": model.task,
        "persistent": sorted(k for k in persistent if not k.startswith("Module:")),
        "attn_implementation": model.attn_implementation,
        "python_version": sys.version,
        "packages": {name: version for name, version in packages.items() if version != "local"},
    }


def _dtype(name: str) -> dict[str, Any]:
    if name == "auto":
        return {}
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise SettingsError(
            f"dtype {name!r} is not a torch dtype; for example float32, bfloat16, auto"
        )
    return {"dtype": dtype}
