"""Loading a model once, exactly as a researcher's own process would.

The wrapper comes from nnsight (`Remotable.from_model_key`), so modules, attention and tokenizer are
those of a plain local load in the same dtype. The key names the class to import, and keys come from
clients: only classes listed here are taken.

From a hub, the files are fetched first and counted as they come, and the commit that the revision
stands for is pinned, so that what is reported is what was loaded. A folder's commit is taken from its
contents, as the relay's hub takes it (`objects.repository`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from nnsight.modeling.mixins.remotable import Remotable
from nnsight.ndif import get_local_env
from tqdm.auto import tqdm

from edif_hpc.errors import NotPermitted, SettingsError
from edif_hpc.objects.repository import read_manifest
from edif_hpc.worker.engine.messages import Load

CLASSES = (
    "nnsight.modeling.transformers.TransformersModel",
    "nnsight.modeling.language.LanguageModel",
    "nnsight.modeling.vlm.VisionLanguageModel",
)
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab")

Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the files are, and which commit they are of."""

    place: str
    commit: str | None
    pin: str | None  #: the revision to load; None for a folder, which has one state only
    readable: tuple[Path, ...]


def be_one_thread() -> None:
    """Keep tqdm from starting its watching thread: the zygote must be able to make namespaces."""
    tqdm.monitor_interval = 0


def fetch(load: Load, report: Report) -> Source:
    """Make sure that the files are on this machine."""
    folder = Path(load.source)
    if folder.is_dir():
        commit = read_manifest(folder).commit
        return Source(place=str(folder), commit=commit, pin=None, readable=(folder.resolve(),))
    info = HfApi().model_info(load.source, revision=load.revision, files_metadata=True)
    names = [file.rfilename for file in info.siblings or []]
    safe = any(name.endswith(".safetensors") for name in names)
    snapshot = snapshot_download(
        load.source,
        revision=info.sha,
        allow_patterns=[*_SMALL_FILES, "*.safetensors" if safe else "*.bin"],
        tqdm_class=_counting(report),
    )
    # Snapshots are links into the repository's own folder of blobs.
    blobs = Path(snapshot).parents[1]
    return Source(place=load.source, commit=info.sha, pin=info.sha, readable=(blobs,))


def load_model(load: Load, source: Source) -> Any:
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
    identity = {**json.loads(suffix), "repo_id": source.place, "revision": source.pin}
    key = f"{import_path}:{json.dumps(identity)}"
    return Remotable.from_model_key(key, dispatch=True, **_dtype(load.dtype))


def describe(model: Any, source: Source) -> dict[str, Any]:
    """Return the part of `EngineInfo` that only this side can know."""
    persistent = model._remoteable_persistent_objects()  # noqa: SLF001 - nnsight's server API
    env = get_local_env()
    return {
        "commit": source.commit,
        "dtype": str(next(model._module.parameters()).dtype).removeprefix("torch."),  # noqa: SLF001
        "model_class": type(model._module).__name__,  # noqa: SLF001
        "task": model.task,
        "persistent": sorted(k for k in persistent if not k.startswith("Module:")),
        "attn_implementation": model.attn_implementation,
        "python_version": sys.version,
        "packages": {k: v for k, v in env["packages"].items() if v != "local"},
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


def _counting(report: Report) -> type[tqdm[Any]]:
    """Return a progress bar for the hub's downloads that reports bytes and prints nothing."""

    class Counting(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": None, "gui": True})

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B":
                report("fetching", int(self.n), int(self.total or 0))

    return Counting
