"""A bare connection to the worker gateway, for what no real worker says, and the waiting that goes with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import Dealer, KeyPair, LinkEvent

T = TypeVar("T")

WAIT_S = 30.0
_AGAIN_S = 1.0


async def until(predicate: Callable[[], T], what: str) -> T:
    """Wait for a condition, generously."""
    return await wait_until_async(predicate, WAIT_S, what)


@dataclass
class Peer:
    """A bare connection: what a test says, it says; what it hears, the test reads."""

    heard: list[m.FromRelay] = field(default_factory=list)
    events: list[LinkEvent] = field(default_factory=list)
    dealer: Dealer | None = None

    def dial(self, endpoint: str, server_key: str, keys: KeyPair) -> None:
        """Connect, or try to."""
        self.dealer = Dealer(
            endpoint=endpoint,
            server_key=server_key,
            keys=keys,
            on_batch=lambda batch: self.heard.extend(map(codec.decode_from_relay, batch)),
            on_event=lambda event, _: self.events.append(event),
        )

    def say(self, *messages: m.Message) -> None:
        """Send messages."""
        for each in messages:
            self.say_bytes(codec.encode(each))

    def say_bytes(self, frame: bytes) -> None:
        """Send anything."""
        if self.dealer is None or not self.dealer.send(frame):
            raise ConnectionError("the frame was not queued")

    async def hears(self, kind: type[T], *, nth: int = 1) -> T:
        """The nth message of a kind."""

        def found() -> list[T]:
            mine: list[T] = [each for each in self.heard if isinstance(each, kind)]
            return mine[nth - 1 : nth]

        return (await until(found, f"the peer hears {kind.__name__} number {nth}; {self.heard}"))[
            0
        ]

    async def greet(
        self, *, window: int = 1, held: list[m.Held] | None = None, nonce: str = "n"
    ) -> None:
        """Become a warm worker; a Hello into a connection that broke is lost, so it is repeated."""
        hello = m.Hello(versions=[1], nonce=nonce, held=held or [], state="warm")
        before = self._welcomes()
        for _ in range(int(WAIT_S / _AGAIN_S)):
            self.say(hello)
            with suppress(TimeoutError):
                await wait_until_async(lambda: self._welcomes() > before, _AGAIN_S, "a Welcome")
                break
        self.say(m.Pull(window=window, executors=1))

    def _welcomes(self) -> int:
        return sum(isinstance(each, m.Welcome) for each in self.heard)

    async def close(self) -> None:
        """Hang up."""
        dealer, self.dealer = self.dealer, None
        if dealer is not None:
            await dealer.close()
