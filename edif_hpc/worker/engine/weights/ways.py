"""Which way executors have the weights, decided step by step while the zygote gets ready.

On the CPU they are mapped. On devices they are *private* or *shared*, as the deployment says; shared ones are tried, and
where that fails they are private, and the reason is kept for `ps`. `auto` is private: it needs nothing but memory, an edit
of weights cannot reach anybody else, and it holds under every compute mode; shared is faster where it works, and for an
operator to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edif_hpc.errors import EdifError, EngineError
from edif_hpc.worker.engine.messages import Load
from edif_hpc.worker.engine.model.device import Device
from edif_hpc.worker.engine.values import Level
from edif_hpc.worker.engine.walls.jail import Jail
from edif_hpc.worker.engine.weights import placement
from edif_hpc.worker.engine.weights.base import Holder, MemoryFile, Private, Spread
from edif_hpc.worker.engine.weights.placement import Placement
from edif_hpc.worker.engine.weights.shared import Shared


class Keeping:
    """The holder of a zygote, from its first model until it can fork."""

    def __init__(self, load: Load, own: Sequence[Device]) -> None:
        self._load = load
        self._own = own
        #: Why they are not had the way that was asked for.
        self.missing: list[str] = []
        #: Of each model, by task.
        self.placements: dict[str, Placement] = {}
        self._spreads: list[Spread] = []
        self.holder: Holder = MemoryFile()
        if own:
            self.holder = Shared() if load.weights == "shared" else Private()

    def prepare(self, models: Mapping[str, Any], level: Level, readable: Sequence[Path]) -> None:
        """Cut the models for the devices, and have the weights there if they are shared; before the zygote shuts itself in.

        Raises:
            EngineError: they do not fit.
        """
        modules = {task: model._module for task, model in models.items()}  # noqa: SLF001 - as nnsight's own helpers do
        self.placements = dict.fromkeys(modules, placement.WHOLE)
        if len(self._own) > 1:
            self._cut(modules)
        self._spreads = [self.placements[t].spread(each) for t, each in modules.items()]
        holder = self.holder
        if not isinstance(holder, Shared):
            return
        if level is Level.PROCESS:
            self._give_up(f"at the level {level} nothing ends what an executor has started")
            return
        load = self._load
        self._try(
            lambda: holder.start(
                self._spreads, load.device, load.devices, driver=load.driver, readable=readable
            )
        )

    def prove(self, jail: Jail, scratch: Path) -> None:
        """Try that an executor can open shared weights, now that it can be forked as they all are."""
        holder = self.holder
        if isinstance(holder, Shared):
            self._try(lambda: holder.probe(jail, scratch, self._spreads, self._own))

    def _cut(self, modules: Mapping[str, Any]) -> None:
        if len(modules) > 1:
            raise EngineError(
                f"a deployment over {len(self._own)} GPUs serves one task, not {', '.join(modules)}; deploy the others by themselves"
            )
        sizes = placement.totals(self._own, self._load.driver, placement.run_forked)
        for task, module in modules.items():
            self.placements[task] = placement.place(module, sizes)

    def _try(self, step: Callable[[], None]) -> None:
        try:
            step()
        except (EdifError, OSError) as error:
            self._give_up(str(error))

    def _give_up(self, reason: str) -> None:
        if isinstance(self.holder, Shared):
            self.holder.stop()
        self.holder = Private()
        self.missing.append(f"shared weights: {reason}")
