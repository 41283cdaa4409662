"""What a pilot hears of its successor's ticket, when the relay is late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from edif_hpc.clock import SystemClock
from edif_hpc.pilot.link import PilotLink
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import Incoming, KeyPair, Router

WAIT_S = 10.0


@dataclass
class Job:
    id: str | None = "17"
    restarts: int = 0
    left_s: float | None = 60.0


@dataclass
class Desk:
    """A relay that notes what it is asked, and answers when the test says so."""

    keys: KeyPair = field(default_factory=KeyPair.generate)
    asked: list[tuple[bytes, m.Revive]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.router = Router(
            bind="tcp://127.0.0.1:*", keys=self.keys, known=lambda _: True, on_batch=self._received
        )

    def _received(self, batch: list[Incoming]) -> None:
        for each in batch:
            message = codec.decode_from_peer(each.frame)
            if isinstance(message, m.Revive):
                self.asked.append((each.route, message))

    def answer(self, number: int, token: str) -> None:
        route, asked = self.asked[number]
        ticket = m.Order(allocation="abcdef0123456789", join_token=token, turn=asked.turn)
        self.router.send(route, codec.encode(ticket))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    desk = Desk()
    yield desk
    desk.router.close()


async def test_a_ticket_that_was_taken_again_since_is_not_used(desk: Desk) -> None:
    """A relay that stood still answers twice; the first token was good until the second was made."""
    link = PilotLink(
        endpoint=desk.router.endpoint,
        server_key=desk.keys.public,
        keys=KeyPair.generate(),
        clock=SystemClock(),
        job=Job(),
    )
    assert await link.ask(m.Revive(), within_s=0.01) is None

    async def answer_both() -> None:
        await wait_until_async(lambda: len(desk.asked) == 2, WAIT_S, "it asked twice")
        desk.answer(0, "old")
        desk.answer(1, "new")

    async with asyncio.TaskGroup() as group:
        group.create_task(answer_both())
        ticket = await link.ask(m.Revive(), within_s=WAIT_S)
    assert ticket is not None
    assert ticket.join_token == "new"
    await link.goodbye("drained")
