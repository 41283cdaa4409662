"""A zygote whose executors lack walls that a test has named, to show that each wall is needed.

    engine = Engine(spec, launching(frozenset({"landlock"})))

What can be left out: each step of `Jail.steps` by its name, `namespaces` (all that need one, and the PID namespace itself), and
`watch` (the worker's eye on memory and files). What does not exist at the level of this machine is left out already. The level
is probed with all walls up, so an engine that leaks claims the level that it would have: only attacks tell the difference.

There is no setting, variable or message by which an engine of ours would start this module: only who calls `launching` does.

    python -m edif_hpc.testing.leaky_zygote CONTROL_FD WORKER_PID NAME,NAME
"""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edif_hpc.domain.limits import Limits
from edif_hpc.worker.engine import zygote
from edif_hpc.worker.engine.launch import Launch, OnProgress, Program, launched
from edif_hpc.worker.engine.seat import Seat
from edif_hpc.worker.engine.values import EngineSpec
from edif_hpc.worker.engine.walls import syscalls
from edif_hpc.worker.engine.walls.jail import Jail, Layers
from edif_hpc.worker.engine.walls.watch import Watch

#: Steps that need a namespace, or change one that others would share if the executor had none of its own.
NAMESPACED = frozenset({"mounts", "scratch", "shm", "proc", "user"})


class LeakyJail(Jail):
    """The walls but for some."""

    def __init__(self, layers: Layers, *, without: frozenset[str]) -> None:
        self._without = without
        if without & {"namespaces", "mounts"}:
            self._without |= NAMESPACED - ({"user"} if "namespaces" not in without else set())
        super().__init__(layers)

    def shut(self, scratch: Path, *arguments: Any, **options: Any) -> None:
        """Shut as always, but that steps can write in a /proc that they share."""
        super().shut(scratch, *arguments, **options)
        if self.layers.namespaces and "proc" in self._without:
            syscalls.mount_setattr(Path("/proc"), off=syscalls.MOUNT_ATTR_RDONLY)

    def fork(self) -> int:
        """Fork; without namespaces the child is one of the zygote's own."""
        return os.fork() if "namespaces" in self._without else super().fork()

    def steps(self, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield the steps that are not left out."""
        for name, step in super().steps(folder):
            if name not in self._without:
                yield name, step


class Blind(Watch):
    """Sees nothing."""

    @asynccontextmanager
    async def over(self, seat: Seat, limits: Limits) -> AsyncIterator[None]:  # noqa: ARG002
        """Let it do what it likes."""
        yield


def launching(without: frozenset[str]) -> Launch:
    """Return what starts an engine's zygote `without` those walls."""

    async def launch(spec: EngineSpec, on_progress: OnProgress) -> Program:
        names = ",".join(sorted(without))
        program = await launched(spec, on_progress, __name__, [names])
        if "watch" in without:
            program.watch = Blind()
        return program

    return launch


if __name__ == "__main__":
    without = frozenset(sys.argv[3].split(","))
    sys.exit(zygote.main(sys.argv[1:3], partial(LeakyJail, without=without)))
