"""A deployment: what an operator wants served, and which requests it serves.

nnsight names a model by a key, `import.path.Class:{json}`. Two spellings of one model must meet in one deployment:
`revision` null and "main" are the same. The task in the key picks a pipeline, and with it the class that is built over the
weights: a deployment may serve several tasks, each under its own key, from one set of weights. The class in the key is
imported by the engine, so only listed classes are let in (`ALLOWED_CLASSES`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.levels import Level
from edif_hpc.domain.limits import SAYS_NOTHING, Allowed
from edif_hpc.errors import InvalidInput, NotFound, NotPermitted

ALLOWED_CLASSES = frozenset({"nnsight.modeling.transformers.TransformersModel"})
#: Attention that is part of torch and transformers and needs no compiler, which an executor has not. For a name that
#: transformers does not know, it would fetch code from a hub.
ALLOWED_ATTENTION = frozenset({"eager", "sdpa"})
DEFAULT_TASK = "text-generation"
#: PyTorch calls the GPUs of AMD cuda, too. On `cpu:0` each executor has a copy of the weights, as on a GPU: for tests.
DEVICES = ("cpu", "cuda", "cpu:0")
#: How executors have weights on a device: a copy for each, or one that they share and that is restored after each.
ON_DEVICES = ("private", "shared")
#: What an operator may ask for; auto is private.
WEIGHTS = ("auto", *ON_DEVICES)
#: Other names of tasks, as transformers takes them; a client's key has the name on the right.
TASK_ALIASES = {
    "ner": "token-classification",
    "sentiment-analysis": "text-classification",
    "text-to-speech": "text-to-audio",
}

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True, kw_only=True)
class ModelKey:
    """A model key taken apart. `revision` None stands for the default branch."""

    import_path: str
    repo_id: str
    revision: str | None
    task: str
    trust_remote_code: bool = False

    def render(self) -> str:
        """The key as nnsight 0.8 writes it."""
        body: dict[str, Any] = {"repo_id": self.repo_id, "revision": self.revision}
        if self.trust_remote_code:
            body["trust_remote_code"] = True
        return f"{self.import_path}:{json.dumps(body | {'task': self.task})}"


def parse_model_key(text: str) -> ModelKey:
    """Take a client's model key apart; raise `InvalidInput` for a class outside the allow-list or a malformed key."""
    import_path, _, suffix = text.partition(":")
    if import_path not in ALLOWED_CLASSES:
        raise InvalidInput(
            f"the model class {import_path!r} is not served; use one of: {', '.join(sorted(ALLOWED_CLASSES))} "
            "(nnsight's LanguageModel and VisionLanguageModel count as TransformersModel)"
        )
    try:
        body = json.loads(suffix)
        repo_id = body["repo_id"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidInput(
            f"the model key {text[:200]!r} is not class:json with a repo_id"
        ) from error
    revision = body.get("revision")
    task = body.get("task") or DEFAULT_TASK
    trust = body.get("trust_remote_code", False)
    if not (isinstance(repo_id, str) and isinstance(task, str) and isinstance(trust, bool)):
        raise InvalidInput(f"the model key {text[:200]!r} has a field of the wrong type")
    if revision is not None and not isinstance(revision, str):
        raise InvalidInput(
            f"the revision in the model key must be a string or null, not {revision!r}"
        )
    return ModelKey(
        import_path=import_path,
        repo_id=repo_id,
        revision=None if revision == "main" else revision,
        task=task,
        trust_remote_code=trust,
    )


def check_env(env: Mapping[str, Any], adapters: Sequence[Adapter] = ()) -> None:
    """Raise `InvalidInput` unless the envelope's env is within the allow-lists; `adapters` are those served."""
    unknown = sorted(set(env) - {"attn_implementation", "peft"})
    if unknown:
        raise InvalidInput(f"env has {unknown}; this relay accepts attn_implementation and peft")
    attention = env.get("attn_implementation")
    if attention is not None and attention not in [*ALLOWED_ATTENTION]:
        raise InvalidInput(
            f"attn_implementation {attention!r} is not allowed; use one of: {', '.join(sorted(ALLOWED_ATTENTION))}"
        )
    adapter, served = env.get("peft"), [each.repo_id for each in adapters]
    if adapter is not None and adapter not in served:
        raise InvalidInput(
            f"the PEFT adapter {adapter!r} is not served with this model; served: {', '.join(served) or 'none'}. "
            "An operator lists adapters when the model is deployed"
        )


def each_task(names: Iterable[str]) -> tuple[str, ...]:
    """The tasks that an operator names, each once and as clients' keys have it."""
    return tuple(dict.fromkeys(TASK_ALIASES.get(each, each) for each in names))


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """A model with its revision, dtype, resources and the number of replicas wanted."""

    name: str
    repo_id: str
    revision: str | None
    task: str
    more_tasks: tuple[str, ...] = ()  #: served beside it, from the same weights
    dtype: str = "float32"
    source: str | None = None  #: a local path or hub endpoint to load from, when not the Hub
    trust_remote_code: bool = False
    replicas: int = 1
    device: str = "cpu"
    weights: str = "auto"  #: how executors have them on a device: one of `WEIGHTS`
    executors: int = 1  #: requests that one worker runs at a time
    isolation_floor: str = Level.NO_NAMESPACES  #: level below which a worker refuses to serve
    adapters: tuple[Adapter, ...] = ()  #: those that a request may have attached
    site: str | None = None  #: where the relay keeps its slots filled
    gpu: str | None = None  #: a kind of GPU in the profile of its site
    gpus: int = 1  #: of one worker
    walltime_min: int | None = None  #: of one generation; None runs without an end
    up_at: float | None = None  #: when an operator last wanted it up, wall clock; None while not
    limits: Allowed = SAYS_NOTHING  #: what each of its requests may use
    created_at: float = 0.0

    @property
    def tasks(self) -> tuple[str, ...]:
        """All that is served."""
        return (self.task, *self.more_tasks)

    @property
    def model_key(self) -> ModelKey:
        """The key of this deployment's first task."""
        return self.model_keys[0]

    @property
    def model_keys(self) -> tuple[ModelKey, ...]:
        """The key of each task."""
        return tuple(
            ModelKey(
                import_path="nnsight.modeling.transformers.TransformersModel",
                repo_id=self.repo_id,
                revision=self.revision,
                task=task,
                trust_remote_code=self.trust_remote_code,
            )
            for task in self.tasks
        )

    def serves(self, key: ModelKey) -> bool:
        """Whether a request with this key can run here."""
        mine = self.model_key
        return (
            (key.repo_id.lower(), key.revision) == (mine.repo_id.lower(), mine.revision)
            and key.task in self.tasks
            and (self.trust_remote_code or not key.trust_remote_code)
        )


def check_name(name: str) -> str:
    """Return the name of a deployment, or raise `InvalidInput`: it becomes part of job names and paths."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"the name {name!r} must be 1-40 characters of a-z, 0-9 and '-', without '-' at its ends"
        )
    return name


def check_weights(weights: str, *, device: str) -> str:
    """Return how executors are to have the weights, or raise `InvalidInput`."""
    if weights not in WEIGHTS:
        raise InvalidInput(
            f"weights {weights!r} are not known; choose one of: {', '.join(WEIGHTS)}"
        )
    if device == "cpu" and weights != "auto":
        raise InvalidInput(
            f"weights {weights!r} are for a GPU; on the CPU executors share pages that none of them can change for others"
        )
    return weights


def check_device(device: str, *, executors: int = 1) -> str:
    """Return what a deployment is computed on, or raise `InvalidInput`."""
    if device not in DEVICES:
        raise InvalidInput(
            f"the device {device!r} is not served; choose cpu, or cuda for GPUs of NVIDIA or AMD (how many: edif-hpc up --gpus)"
        )
    if device != "cpu" and executors > 1:
        raise InvalidInput(
            f"{executors} executors on the device {device}: it runs one request at a time, which has all of its memory; "
            "take one executor, and more replicas"
        )
    return device


def default_name(repo_id: str) -> str:
    """A deployment's name made from its repository."""
    text = (
        re.sub(r"[^a-z0-9]+", "-", repo_id.rpartition("/")[2].lower()).strip("-")[:40].strip("-")
    )
    return check_name(text or "model")


def find_deployment(key: ModelKey, deployments: Iterable[Deployment]) -> Deployment:
    """The deployment that serves `key`; raise `NotFound` that lists what is deployed."""
    known = sorted(deployments, key=lambda each: each.name)
    for each in known:
        if each.serves(key):
            return each
    plain = replace(key, trust_remote_code=False)
    if key.trust_remote_code and any(each.serves(plain) for each in known):
        raise NotPermitted(
            f"{key.repo_id} is deployed here without its own code, and your model was made with trust_remote_code=True. "
            "Make it without; or ask the operator, who can deploy it with --trust-remote-code"
        )
    listing = ", ".join(_told(each.repo_id, each.tasks, each.revision) for each in known)
    asked = _told(key.repo_id, (key.task,), key.revision)
    raise NotFound(f"{asked} is not deployed here. Deployed: {listing or 'nothing yet'}.")


def _told(repo_id: str, tasks: Sequence[str], revision: str | None) -> str:
    words = [f"task{'s' if len(tasks) > 1 else ''} {' and '.join(tasks)}"]
    return f"{repo_id} ({', '.join([*words, *([f'revision {revision}'] if revision else [])])})"
