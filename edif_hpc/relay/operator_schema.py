"""The bodies that `/api` takes, and what it shows of requests and tokens.

A body is strict: a field that does not exist is refused by name, because an operator who misspells `replicas` must not
get one replica in silence.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from edif_hpc.domain.adapter import Adapter, each_once
from edif_hpc.domain.deployment import (
    DEFAULT_TASK,
    Deployment,
    check_device,
    check_name,
    check_weights,
    default_name,
    each_task,
)
from edif_hpc.domain.levels import Level
from edif_hpc.domain.limits import SAYS_NOTHING, Allowed, checked
from edif_hpc.domain.people import Role, Token
from edif_hpc.domain.request import Request
from edif_hpc.objects.repository import check_repo_id

Text = Annotated[str, Meta(min_length=1, max_length=400)]
Count = Annotated[int, Meta(ge=1, le=1000)]
Walltime = Annotated[int, Meta(ge=1, le=366 * 24 * 60)]  # minutes
Key = Annotated[str, Meta(min_length=40, max_length=40)]  # a CURVE key in Z85


class NewAdapter(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An adapter that a deployment is to serve."""

    repo_id: Text
    revision: Annotated[str, Meta(pattern=r"^[\w./-]{1,100}$")] | None = None

    def value(self) -> Adapter:
        """As the domain has it."""
        revision = None if self.revision == "main" else self.revision
        return Adapter(repo_id=check_repo_id(self.repo_id), revision=revision)


class NewLimits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What requests may use; null takes a limit back, and what is left out stays as it is."""

    wall_s: float | UnsetType | None = UNSET
    memory_bytes: int | UnsetType | None = UNSET
    gpu_memory_bytes: int | UnsetType | None = UNSET
    result_bytes: int | UnsetType | None = UNSET
    log_bytes: int | UnsetType | None = UNSET
    log_lines: int | UnsetType | None = UNSET
    saved_tensors: int | UnsetType | None = UNSET
    scratch_bytes: int | UnsetType | None = UNSET
    request_bytes: int | UnsetType | None = UNSET

    def over(self, old: Allowed) -> Allowed:
        """What holds after the change."""
        said = msgspec.structs.asdict(self)
        return dataclasses.replace(
            old, **{name: value for name, value in said.items() if value is not UNSET}
        )


class NewDeployment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment as an operator asks for it."""

    repo_id: Text
    name: Text | None = None
    revision: Text | None = None
    task: Text = DEFAULT_TASK
    more_tasks: Annotated[list[Text], Meta(max_length=20)] = []
    dtype: Text = "float32"
    source: Text | None = None
    trust_remote_code: bool = False
    replicas: Annotated[int, Meta(ge=0, le=1000)] = 1
    device: Text = "cpu"
    weights: Text = "auto"
    executors: Count = 1
    isolation_floor: Level = Level.NO_NAMESPACES
    site: Text | None = None
    gpu: Text | None = None
    gpus: Annotated[int, Meta(ge=0, le=256)] = 1
    walltime_min: Walltime | None = None
    adapters: Annotated[list[NewAdapter], Meta(max_length=100)] = []
    limits: NewLimits = NewLimits()

    def value(self) -> Deployment:
        """As the domain has it; "main" is the default branch."""
        fields = msgspec.structs.asdict(self)
        fields["name"] = check_name(self.name) if self.name else default_name(self.repo_id)
        fields["revision"] = None if self.revision == "main" else self.revision
        fields["device"] = check_device(self.device, executors=self.executors)
        fields["weights"] = check_weights(self.weights, device=self.device)
        fields["task"], *more = each_task([self.task, *self.more_tasks])
        fields["more_tasks"] = tuple(more)
        fields["adapters"] = each_once(each.value() for each in self.adapters)
        fields["limits"] = checked(self.limits.over(SAYS_NOTHING))
        return Deployment(**fields)


class NewToken(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A token as an operator asks for it."""

    name: str
    role: Role = Role.RESEARCHER
    expires_in_s: float | None = None
    queue_s: float | None = None
    limits: NewLimits = NewLimits()
    keep: bool = False


class NewAllocations(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment is wanted up, at a site: its free slots are to be filled, and with a walltime kept so."""

    deployment: Text
    site: Text
    slots: Count | None = None
    gpu: Text | None = None
    gpus: Annotated[int, Meta(ge=0, le=256)] | None = None
    walltime_min: Walltime | None = None


class Scale(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many replicas a deployment is to have from now on."""

    replicas: Annotated[int, Meta(ge=0, le=1000)]


class Submitted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduler took an allocation."""

    job_id: Text


class Failed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An allocation never started, or it ended."""

    cause: Text
    detail: str = ""


class Join(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A pilot registers the public keys that it made on its node."""

    join_token: Text
    worker_key: Key
    pilot_key: Key
    node: Text


class Drain(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to drain; neither means everything."""

    deployment: Text | None = None
    allocation: Text | None = None


def request_view(request: Request) -> dict[str, Any]:
    """A request without what is ours alone: who holds it, and its hash."""
    hidden = {"holder", "blob_sha256"}
    return {
        each.name: getattr(request, each.name)
        for each in dataclasses.fields(request)
        if each.name not in hidden
    }


def token_view(token: Token) -> dict[str, Any]:
    """A token without the hash of its secret."""
    return {
        each.name: getattr(token, each.name)
        for each in dataclasses.fields(token)
        if each.name != "secret_sha256"
    }
