"""What the worker's loop needs of the world: a wire to the relay, and an engine that runs requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from edif_hpc.worker.engine.values import EngineInfo, Job, Outcome, Progress


class Wire(Protocol):
    """The socket (`wire.sockets.Dealer`)."""

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False if the queue is full."""

    def reconnect(self) -> None:
        """Drop the connection and dial again."""

    async def close(self) -> None:
        """Flush and close."""


class Engine(Protocol):
    """What runs requests (`worker.engine.pool.Engine`)."""

    async def start(self, on_progress: Callable[[Progress], None]) -> EngineInfo:
        """Load the model and pass the self-test."""

    async def run(
        self,
        job: Job,
        on_log: Callable[[str], None],
        on_written: Callable[[Path, int], None],
    ) -> Outcome:
        """Run one job; cancelling the call kills its executor before it returns.

        `on_written` hears how many bytes of the result's file are final.
        """

    async def stop(self) -> None:
        """End all its processes."""

    @property
    def died(self) -> asyncio.Future[str]:
        """Resolved with the reason when it cannot run jobs any more."""
