"""A worker hears an executor out, also one that is gone before the worker has read all it said."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from edif_hpc.worker.engine.messages import TO_EXECUTOR, Done, Log
from edif_hpc.worker.engine.protocol import FROM_EXECUTOR_BYTES, Channel, PeerClosed
from edif_hpc.worker.engine.rerun import Turn
from edif_hpc.worker.engine.seat import Seat
from edif_hpc.worker.engine.values import Job, Saved


def job() -> Job:
    return Job(request_id="r", attempt=1, blob=b"", compress=True, env={})


TURN = Turn(seed=0, gradients=False, wall_s=10)


async def test_what_was_said_is_heard_before_the_seat_is_cleared(tmp_path: Path) -> None:
    seat = Seat(1, tmp_path)
    executor = Channel(seat.theirs, accepts=TO_EXECUTOR, send_limit=FROM_EXECUTOR_BYTES)
    clearing: list[asyncio.Task[None]] = []

    async def clear() -> None:
        async with seat.heard:
            seat.clear()

    def on_log(_: str) -> None:
        clearing.append(asyncio.create_task(clear()))
        executor.send(Done(inline=b"result", size=6, meta={}))

    executor.send(Log(text="a word"))
    outcome = await asyncio.wait_for(seat.run(job(), TURN, on_log, lambda *_: None), 10)
    assert isinstance(outcome, Saved)
    assert outcome.inline == b"result"
    await asyncio.wait_for(clearing[0], 10)


async def test_a_cleared_seat_is_a_dead_executor(tmp_path: Path) -> None:
    seat = Seat(1, tmp_path)
    seat.clear()
    with pytest.raises(PeerClosed):
        await seat.run(job(), TURN, lambda _: None, lambda *_: None)
    with pytest.raises(PeerClosed):
        await seat.channel.receive()
