"""What the zygote prepared, and every executor inherits by being forked from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edif_hpc.domain.deployment import parse_model_key
from edif_hpc.errors import NotPermitted
from edif_hpc.worker.engine.model.device import Device
from edif_hpc.worker.engine.request.console import Console
from edif_hpc.worker.engine.walls.jail import Jail
from edif_hpc.worker.engine.weights import base as weights
from edif_hpc.worker.engine.weights.placement import Placement


@dataclass(frozen=True, kw_only=True)
class House:
    """What the zygote prepared and every executor inherits."""

    #: By task; the first one is the deployment's first.
    models: Mapping[str, Any]
    #: Of a task that lacks some: the names of weights that the checkpoint does not have.
    random_weights: Mapping[str, list[str]]
    #: Tasks whose numbers are those of a local run only when gradients are tracked.
    graded: frozenset[str]
    #: The folder of each adapter that a request may have attached.
    adapters: Mapping[str, str]
    jail: Jail
    threads: int
    scratch: Path
    #: By model key, in the order of `models`.
    selftests: Mapping[str, bytes]
    consoles: tuple[Console, Console]
    holder: weights.Holder
    #: What executors compute on, if not on the CPU.
    devices: Sequence[Device]
    #: Which part of a model is on which, by task.
    placements: Mapping[str, Placement]
    #: What tells its driver which devices are ours.
    driver: Mapping[str, str]
    #: Folders of the site that requests may read.
    stores: tuple[str, ...]

    @property
    def device(self) -> Device | None:
        """The first one, where inputs go."""
        return self.devices[0] if self.devices else None

    def task(self, model_key: str) -> str:
        """Return the task that a key names; the first one for no key.

        Raises:
            NotPermitted: it is not served.
        """
        task = parse_model_key(model_key).task if model_key else next(iter(self.models))
        if task not in self.models:
            raise NotPermitted(
                f"the task {task!r} is not served here; served: {', '.join(self.models)}"
            )
        return task
