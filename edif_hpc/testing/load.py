"""Clients that send without pause and check every end, while around them everything may die.

Each is a thread. Half of them listen on a WebSocket, half poll. A request that was accepted has to end with its right result, bit
for bit, or with an honest ERROR; whatever else happens is a fault, kept in `Load.faults`.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import httpx
from websockets.exceptions import WebSocketException

from edif_hpc.clock import SystemClock
from edif_hpc.testing.raw_client import RawClient, RawSession, Told
from edif_hpc.testing.wait import wait_until
from edif_hpc.testing.work import Piece, Work

HONEST: Final = frozenset({"crash"})
RECOVERY_S: Final = 180.0
_CLOCK: Final = SystemClock()
_AWAY = (httpx.TransportError, WebSocketException, OSError, EOFError, TimeoutError)


@dataclass(frozen=True, kw_only=True)
class Took:
    """When a request was sent and when its client had its result; wall clock."""

    sent_at: float
    ended_at: float
    runs_s: float  #: how long it runs by itself

    @property
    def delay_s(self) -> float:
        """What it took beyond its own run."""
        return self.ended_at - self.sent_at - self.runs_s


class Load:
    """The clients, each a thread."""

    def __init__(self, client: RawClient, work: Work, *, clients: int, seed: int) -> None:
        self.right: dict[str, Callable[[bytes], bool]] = {}
        self.took: list[Took] = []
        self.faults: list[str] = []
        self.sent_again = 0
        self._client, self._work = client, work
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(number, random.Random(f"{seed} client {number}")),  # noqa: S311 - repeatable
                name=f"client-{number}",
            )
            for number in range(clients)
        ]

    def start(self) -> None:
        """Begin to send."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Send no more, and wait for the ends of what was sent."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int, chance: random.Random) -> None:
        try:
            if number % 2:
                self._poll(chance)
            else:
                self._listen(chance)
        except Exception as error:  # noqa: BLE001 - a client that breaks is a finding
            self.faults.append(f"client {number} broke: {error!r}")

    def _poll(self, chance: random.Random) -> None:
        while not self._stop.is_set():
            piece, at = self._work.piece(chance), _CLOCK.wall()
            self._check(self._client.ended(self._sent(piece, None), RECOVERY_S), piece, at)

    def _listen(self, chance: random.Random) -> None:
        """One socket for many requests, so that a second end of one would be seen."""
        while not self._stop.is_set():
            ended: set[str] = set()
            try:
                session = self._client.subscribe()
            except _AWAY:
                self._stop.wait(0.05)
                continue
            with session:
                while not self._stop.is_set() and self._listen_once(
                    session, self._work.piece(chance), ended
                ):
                    pass

    def _listen_once(self, session: RawSession, piece: Piece, ended: set[str]) -> bool:
        """Send one and hear its end; False if the socket broke."""
        at = _CLOCK.wall()
        request_id = self._sent(piece, session)
        if not request_id:
            return False
        while True:
            try:
                told = session.next(RECOVERY_S)
            except _AWAY:
                self._check(self._client.ended(request_id, RECOVERY_S), piece, at)
                return False
            if told.id in ended:
                self.faults.append(f"{told.id}: a {told.status} frame after its end")
            if told.id == request_id and told.ended:
                ended.add(told.id)
                self._check(told, piece, at)
                return True

    def _sent(self, piece: Piece, session: RawSession | None) -> str:
        """Send until RECEIVED; a listening client whose socket broke gives up with an empty id."""
        while True:
            try:
                request_id = self._client.send(
                    piece.blob, compress=piece.compress, session=session.id if session else ""
                )
            except httpx.HTTPStatusError as error:
                if session is not None and error.response.status_code == httpx.codes.NOT_FOUND:
                    return ""  # a relay that was started anew knows no sessions
                if error.response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    raise
            except _AWAY:
                self.sent_again += 1
                self._stop.wait(0.05)
            else:
                self.right[request_id] = piece.right
                return request_id

    def _check(self, end: Told, piece: Piece, sent_at: float) -> None:
        if end.status == "ERROR":
            if end.kind not in HONEST:
                self.faults.append(f"{end.id}: ended with {end.kind}: {end.description}")
            return
        if not piece.right(self._fetched(end)):
            self.faults.append(f"{end.id}: its client was given a wrong result")
        took = Took(sent_at=sent_at, ended_at=_CLOCK.wall(), runs_s=piece.runs_s)
        self.took.append(took)

    def _fetched(self, end: Told) -> bytes:
        def attempt() -> tuple[bytes] | None:
            try:
                return (self._client.result(end),)
            except _AWAY:
                return None

        found = wait_until(attempt, RECOVERY_S, f"the result of {end.id} is fetched")
        return found[0] if found else b""
