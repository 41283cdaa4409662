"""Who may say what, and when."""

from __future__ import annotations

import itertools

import pytest

from edif_hpc.domain.allocation import PeerRole
from edif_hpc.errors import RemoteProtocolError
from edif_hpc.testing.messages import FROM_PEER
from edif_hpc.wire import messages as m
from edif_hpc.wire.turns import MAY_SEND, UNKNOWN_SESSION, RelaySession, Turn

HELLO = m.Hello(versions=[1], nonce="n")

#: role → what it may say. Written out, so that widening it is a decision.
TABLE = {
    PeerRole.WORKER: "Hello State Pull Started Renew Log Need Done Return Goodbye",
    PeerRole.PILOT: "Hello State Renew Report Revive Ordered Goodbye",
    PeerRole.LAUNCHER: "Hello State Renew Report Goodbye",
}


@pytest.mark.parametrize(("role", "message"), list(itertools.product(PeerRole, FROM_PEER)))
def test_each_role_and_each_message(role: PeerRole, message: m.FromPeer) -> None:
    session = RelaySession(role=role)
    assert session.admit(HELLO, 1.0) is None
    if type(message).__name__ in TABLE[role].split():
        assert session.admit(message, 2.0) is None
        assert session.heard_at == 2.0
    else:
        with pytest.raises(RemoteProtocolError, match=f"a {role} may not send"):
            session.admit(message, 2.0)
        assert session.heard_at == 1.0, "what is refused is no sign of life"


def test_the_table_covers_every_role_and_message() -> None:
    assert set(MAY_SEND) == set(PeerRole)
    said = {each for kinds in MAY_SEND.values() for each in kinds}
    assert said == set(m.FromPeer.__args__)


@pytest.mark.parametrize("message", [each for each in FROM_PEER if not isinstance(each, m.Hello)])
def test_nothing_comes_before_hello(message: m.FromPeer) -> None:
    role = next(role for role, kinds in MAY_SEND.items() if isinstance(message, kinds))
    session = RelaySession(role=role)
    refusal = session.admit(message, 1.0)
    assert refusal is not None
    assert refusal.code == UNKNOWN_SESSION
    assert session.turn is Turn.NEW


def test_after_goodbye_comes_a_new_hello() -> None:
    session = RelaySession(role=PeerRole.WORKER)
    session.admit(HELLO, 1.0)
    assert session.admit(m.Goodbye(cause="drained"), 2.0) is None
    assert session.turn is Turn.GONE
    refusal = session.admit(m.Renew(), 3.0)
    assert refusal is not None
    assert refusal.code == UNKNOWN_SESSION
    assert session.admit(m.Hello(versions=[1], nonce="other"), 4.0) is None
    assert (session.turn, session.nonce) == (Turn.OPEN, "other")


def test_versions_must_meet() -> None:
    session = RelaySession(role=PeerRole.WORKER)
    refusal = session.admit(m.Hello(versions=[7, 8], nonce="n"), 1.0)
    assert refusal is not None
    assert refusal.code == "protocol"
    assert "[7, 8]" in refusal.detail
    assert "[1]" in refusal.detail
    assert "matching versions" in refusal.detail
    assert session.turn is Turn.NEW
    assert session.admit(m.Hello(versions=[8, 1], nonce="n"), 1.0) is None
    assert session.version == 1
