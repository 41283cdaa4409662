"""The relay's end of one connection: which role may say what, and when. No I/O.

    NEW ──Hello──► OPEN ──Goodbye──► GONE

It decides nothing about requests. A message out of turn is answered with `unknown_session`, which asks for a new Hello: a
relay that was started anew knows no connection, and its peers carry on with one round trip. A message that the role may
never send is the peer's fault.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from edif_hpc.domain.allocation import PeerRole
from edif_hpc.errors import RemoteProtocolError
from edif_hpc.wire import messages as m

UNKNOWN_SESSION = "unknown_session"

_WORKER_SAYS = (
    m.Hello,
    m.State,
    m.Pull,
    m.Started,
    m.Renew,
    m.Log,
    m.Need,
    m.Done,
    m.Return,
    m.Goodbye,
)
_HOST_SAYS = (m.Hello, m.State, m.Renew, m.Report, m.Goodbye)

#: Which messages each role may send.
MAY_SEND: Mapping[PeerRole, tuple[type[m.Message], ...]] = {
    PeerRole.WORKER: _WORKER_SAYS,
    PeerRole.PILOT: (*_HOST_SAYS, m.Revive, m.Ordered),
    PeerRole.LAUNCHER: _HOST_SAYS,
}


class Turn(StrEnum):
    """The state of a connection at the relay."""

    NEW = "new"
    OPEN = "open"
    GONE = "gone"


@dataclass(kw_only=True)
class RelaySession:
    """The relay's end of one connection of one peer."""

    role: PeerRole
    turn: Turn = Turn.NEW
    nonce: str = ""
    version: int = 0
    heard_at: float = 0.0

    def admit(self, message: m.FromPeer, now: float) -> m.Refused | None:
        """Check a message against role and turn; return the refusal to send, or None if it may pass.

        Raises:
            RemoteProtocolError: the role may not send this message, ever; the peer is at fault or hostile.
        """
        if not isinstance(message, MAY_SEND[self.role]):
            raise RemoteProtocolError(f"a {self.role} may not send {type(message).__name__}")
        self.heard_at = now
        if isinstance(message, m.Hello):
            return self._hello(message)
        if self.turn is not Turn.OPEN:
            return m.Refused(
                code=UNKNOWN_SESSION, detail=f"{type(message).__name__} before Hello; say Hello"
            )
        if isinstance(message, m.Goodbye):
            self.turn = Turn.GONE
        return None

    def _hello(self, message: m.Hello) -> m.Refused | None:
        common = m.SUPPORTED_VERSIONS & set(message.versions)
        if not common:
            return m.Refused(
                code="protocol",
                detail=f"the peer speaks protocol versions {message.versions}, this relay {sorted(m.SUPPORTED_VERSIONS)}; "
                "install matching versions of edif-hpc on both sides",
            )
        self.turn, self.nonce, self.version = Turn.OPEN, message.nonce, max(common)
        return None
