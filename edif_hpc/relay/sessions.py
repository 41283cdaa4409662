"""Who listens: the WebSockets of blocking clients, and what is told to them.

A session belongs to the token that opened it; a request that names it must come from the same token. What happens to a
request becomes an `Update`, put into its session's queue and sent by the WebSocket's own task. Status updates that
only differ in their text replace each other while they wait, so a slow reader gets the newest and no queue grows;
LOG lines and ends are never dropped.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.domain.request import TERMINAL
from edif_hpc.errors import NotFound

LOG = "LOG"
_ENDS = frozenset(str(state) for state in TERMINAL)


@dataclass(frozen=True, kw_only=True)
class Update:
    """One thing to tell a client. `data` is the result's bytes (binary frame) or its URL, on COMPLETED only."""

    request_id: str
    status: str  #: a `RequestState` or LOG
    description: str = ""
    meta: Mapping[str, Any] | None = None
    data: bytes | str | None = None

    @property
    def final(self) -> bool:
        """Whether it ends the request."""
        return self.status in _ENDS


@dataclass(kw_only=True, eq=False)
class Session:
    """One open WebSocket. `base_url` is how its client reaches the relay."""

    id: str
    owner: str
    base_url: str
    requests: set[str] = field(default_factory=set)
    closed: bool = False
    _waiting: deque[Update] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, update: Update) -> None:
        """Queue an update; the newest status of a request replaces one that was not sent yet."""
        if self.closed:
            return
        if self._waiting and self._replaces(update, self._waiting[-1]):
            self._waiting.pop()
        self._waiting.append(update)
        self._wake.set()

    async def next(self) -> Update:
        """Wait for the next update to send."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        return self._waiting.popleft()

    @staticmethod
    def _replaces(new: Update, old: Update) -> bool:
        return (
            new.request_id == old.request_id and new.status == old.status != LOG and not old.final
        )


class Sessions:
    """All open sessions."""

    def __init__(self) -> None:
        self._open: dict[str, Session] = {}

    def open(self, owner: str, base_url: str) -> Session:
        """A new session for a token."""
        session = Session(id=secrets.token_urlsafe(24), owner=owner, base_url=base_url)
        self._open[session.id] = session
        return session

    def get(self, session_id: str, owner: str) -> Session:
        """The session of that id; `NotFound` if it is closed or another token's."""
        session = self._open.get(session_id)
        if session is None or session.owner != owner:
            raise NotFound(
                "the session does not exist (any more); open the connection again, i.e. run the trace again"
            )
        return session

    def close(self, session: Session) -> None:
        """Forget a session whose socket is gone."""
        session.closed = True
        self._open.pop(session.id, None)

    def __len__(self) -> int:
        return len(self._open)
