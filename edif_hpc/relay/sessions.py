"""Who listens: the WebSockets of blocking clients, and what is told to them.

A session belongs to the token that opened it; a request that names it must come from the same token. What happens to a
request becomes an `Update`, put into its session's queue and sent by the WebSocket's own task. Status updates that
only differ in their text replace each other while they wait, so a slow reader gets the newest. LOG lines and ends are
never dropped; a client that leaves too many of them unread loses its connection instead, and fetches its results later.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edif_hpc.domain.request import TERMINAL
from edif_hpc.errors import NotFound

LOG = "LOG"
MAX_UNREAD_BYTES = 64 << 20
_FRAME_BYTES = 500  # of an update, beside its text and data

_log = logging.getLogger(__name__)
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
    def size_bytes(self) -> int:
        """About what it takes in memory."""
        data = len(self.data) if self.data is not None else 0
        return _FRAME_BYTES + len(self.description) + data

    @property
    def final(self) -> bool:
        """Whether it ends the request."""
        return self.status in _ENDS


@dataclass(kw_only=True, eq=False)
class Session:
    """One open WebSocket. `base_url` is how its client reaches the relay; `on_overflow` cuts the connection."""

    id: str
    owner: str
    base_url: str
    requests: set[str] = field(default_factory=set)
    closed: bool = False
    on_overflow: Callable[[], object] = lambda: None
    _unread_bytes: int = 0
    _waiting: deque[Update] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def push(self, update: Update) -> None:
        """Queue an update; the newest status of a request replaces one that was not sent yet."""
        if self.closed:
            return
        if self._waiting and self._replaces(update, self._waiting[-1]):
            self._unread_bytes -= self._waiting.pop().size_bytes
        self._waiting.append(update)
        self._unread_bytes += update.size_bytes
        self._wake.set()
        if self._unread_bytes > MAX_UNREAD_BYTES:
            self._overflow()

    async def next(self) -> Update:
        """Wait for the next update to send."""
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        update = self._waiting.popleft()
        self._unread_bytes -= update.size_bytes
        return update

    def _overflow(self) -> None:
        _log.warning(
            "a client does not read what it is told; its connection ends",
            extra={"event": "session_unread", "owner": self.owner, "bytes": self._unread_bytes},
        )
        self.closed = True
        self._waiting.clear()
        self.on_overflow()

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
