"""The worker's end of the protocol, one event at a time."""

from __future__ import annotations

from typing import Any

import pytest

from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.wire import actions as a
from edif_hpc.wire import messages as m
from edif_hpc.wire.session import SILENCE_BEATS, Link, WorkerSession
from edif_hpc.wire.turns import UNKNOWN_SESSION

BEAT_S = 5.0
WELCOME = m.Welcome(version=1, lease_s=30.0, heartbeat_s=BEAT_S, part_bytes=1024)
UNKNOWN = m.Refused(code=UNKNOWN_SESSION)


def grant(request: str = "r1", attempt: int = 1) -> m.Grant:
    return m.Grant(
        request=request,
        attempt=attempt,
        model_key="k",
        compress=False,
        env={},
        limits={},
        blob=b"",
    )


def lease(request: str = "r1", attempt: int = 1) -> dict[str, Any]:
    return {"request": request, "attempt": attempt}


def done(request: str = "r1", attempt: int = 1) -> m.Done:
    return m.Done(**lease(request, attempt), inline=b"x")


def sent(actions: list[a.Action]) -> list[m.Message]:
    return [each.message for each in actions if isinstance(each, a.Send)]


def kinds(actions: list[a.Action]) -> list[str]:
    """The names of the actions, and of the messages among them."""
    return [
        type(each.message).__name__ if isinstance(each, a.Send) else type(each).__name__.lower()
        for each in actions
    ]


@pytest.fixture
def fresh() -> WorkerSession:
    session = WorkerSession(nonce="n1", window=0, executors=1)
    assert kinds(session.connected(0.0)) == ["Hello"]
    return session


@pytest.fixture
def session(fresh: WorkerSession) -> WorkerSession:
    """Welcomed and warm."""
    assert kinds(fresh.received(WELCOME, 0.0)) == ["welcomed"]
    assert kinds(fresh.warm(executors=1, facts={"gpu": 1})) == ["State", "Pull"]
    return fresh


def test_a_warm_worker_pulls_one_more_than_it_runs(session: WorkerSession) -> None:
    assert (session.window, session.executors) == (2, 1)


def test_hello_is_repeated_until_it_is_welcomed(fresh: WorkerSession) -> None:
    assert kinds(fresh.tick(BEAT_S - 0.1)) == []
    assert kinds(fresh.tick(BEAT_S)) == ["Hello"]
    assert kinds(fresh.tick(BEAT_S + 1)) == []
    fresh.received(WELCOME, 6.0)
    assert kinds(fresh.received(WELCOME, 7.0)) == [], "the answer to the repetition"
    assert kinds(fresh.tick(2 * BEAT_S)) == ["Renew"]


def test_silence_means_a_new_connection(session: WorkerSession) -> None:
    assert kinds(session.tick(SILENCE_BEATS * BEAT_S)) == ["Renew"]
    late = SILENCE_BEATS * BEAT_S + 0.1
    (reconnect,) = session.tick(late)
    assert reconnect == a.Reconnect(silent_s=late)
    assert kinds(session.connected(late)) == ["Hello"]
    assert session.link is Link.GREETING


def test_a_beat_is_a_sign_of_life(session: WorkerSession) -> None:
    session.received(m.Beat(), 15.0)
    assert kinds(session.tick(15.0 + SILENCE_BEATS * BEAT_S)) == ["Renew"]


def test_a_relay_that_forgot_us_is_greeted_once(session: WorkerSession) -> None:
    assert kinds(session.received(UNKNOWN, 1.0)) == ["Hello"]
    assert kinds(session.received(UNKNOWN, 1.0)) == [], "it answers what was said before the Hello"


def test_another_refusal_is_final(session: WorkerSession) -> None:
    refused = m.Refused(code="protocol", detail="versions do not meet")
    assert session.received(refused, 1.0) == [
        a.Fatal(code="protocol", detail="versions do not meet")
    ]


def test_a_request_from_grant_to_ack(session: WorkerSession) -> None:
    assert session.received(grant(), 1.0) == [a.Run(grant=grant())]
    assert session.received(grant(), 1.0) == [], "a second copy"
    assert sent(session.began(**lease())) == [m.Started(**lease())]
    assert sent(session.finished(done(), 2.0)) == [done()]
    assert session.held == 1, "until it is acknowledged"
    acked = session.received(m.Ack(**lease(), accepted=True), 3.0)
    assert acked == [a.Settled(**lease())]
    assert session.held == 0


def test_a_done_is_repeated_until_it_is_acknowledged(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    session.finished(done(), 1.0)
    assert kinds(session.tick(BEAT_S)) == ["Renew"], "not at once"
    assert kinds(session.tick(2 * BEAT_S)) == ["Renew", "Done"]
    session.received(m.Ack(**lease(), accepted=False), 11.0)
    assert kinds(session.tick(3 * BEAT_S)) == ["Renew"]


def test_a_worker_that_is_not_warm_gives_a_grant_back(fresh: WorkerSession) -> None:
    fresh.received(WELCOME, 0.0)
    back = m.Return(**lease(), reason=LeaseEnd.RELEASED)
    assert sent(fresh.received(grant(), 1.0)) == [back]
    assert fresh.held == 0


def test_a_newer_attempt_replaces_an_older_one(session: WorkerSession) -> None:
    session.received(grant(attempt=1), 1.0)
    assert kinds(session.received(grant(attempt=2), 2.0)) == ["kill", "settled", "run"]
    assert kinds(session.received(grant(attempt=1), 2.0)) == []
    assert session.holds(**lease(attempt=2))
    assert kinds(session.finished(done(attempt=1), 3.0)) == ["settled"]


def test_held_leases_are_presented_and_kept_or_abandoned(session: WorkerSession) -> None:
    for name in ("r1", "r2", "r3"):
        session.received(grant(name), 1.0)
    session.began(**lease("r1"))
    session.finished(done("r3"), 1.0)
    (hello,) = sent(session.connected(2.0))
    assert isinstance(hello, m.Hello)
    assert hello.held == [
        m.Held(request="r1", attempt=1, started=True),
        m.Held(request="r2", attempt=1),
        m.Held(request="r3", attempt=1),
    ]
    keep = [m.Held(request="r1", attempt=1), m.Held(request="r3", attempt=1)]
    found = session.received(m.Welcome(**_fields(WELCOME) | {"keep": keep}), 3.0)
    assert kinds(found) == ["welcomed", "kill", "settled", "Done", "Pull"]
    assert found[1] == a.Kill(**lease("r2"), reason="abandoned", report=False)
    assert session.held == 2


def test_what_ends_while_nobody_listens_is_returned_after_the_welcome(
    session: WorkerSession,
) -> None:
    session.received(grant(), 1.0)
    session.began(**lease())
    session.connected(2.0)
    gone = session.returned(**lease(), end=LeaseEnd.EXECUTOR_CRASH, evidence={"cause": "x" * 300})
    assert gone == [a.Settled(**lease())]
    (hello,) = sent(session.connected(3.0))
    assert isinstance(hello, m.Hello)
    assert hello.held == [m.Held(request="r1", attempt=1, started=True)]
    found = sent(session.received(m.Welcome(**_fields(WELCOME) | {"keep": hello.held}), 4.0))
    assert found[0] == m.Return(
        **lease(), reason=LeaseEnd.EXECUTOR_CRASH, evidence={"cause": "x" * 200}
    )
    (again,) = sent(session.connected(5.0))
    assert isinstance(again, m.Hello)
    assert again.held == []


def test_a_cancelled_run_is_killed_and_then_returned(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    session.began(**lease())
    cancel = m.Cancel(**lease(), reason="cancelled")
    assert session.received(cancel, 2.0) == [a.Kill(**lease(), reason="cancelled", report=True)]
    assert session.received(cancel, 2.0) == []
    assert session.held == 1, "its executor is not gone yet"
    assert kinds(session.killed(**lease())) == ["settled", "Return"]


def test_a_cancel_that_comes_after_the_end(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    session.finished(done(), 1.0)
    cancel = m.Cancel(**lease(), reason="cancelled")
    assert kinds(session.received(cancel, 2.0)) == ["kill", "settled"]
    assert session.held == 0


@pytest.mark.parametrize("begun", [False, True])
def test_only_what_has_not_begun_can_be_stolen(session: WorkerSession, *, begun: bool) -> None:
    session.received(grant(), 1.0)
    if begun:
        session.began(**lease())
    found = session.received(m.Steal(**lease()), 2.0)
    assert kinds(found) == ([] if begun else ["kill", "settled", "Return"])
    if not begun:
        assert session.began(**lease()) == []


def test_parts_are_put_again_when_the_relay_lost_them(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    up = m.Done(**lease(), size=3, parts=[m.Part(number=1)])
    session.finished(up, 1.0)
    again = m.Reupload(**lease())
    assert session.received(again, 2.0) == [a.UploadAgain(grant=grant(), done=up)]
    assert session.received(again, 2.0) == [], "it is under way"
    assert kinds(session.tick(20.0)) == ["Renew"], "there is no Done to repeat now"
    assert sent(session.finished(up, 21.0)) == [up]


def test_an_inline_result_cannot_be_put_again(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    session.finished(done(), 1.0)
    assert session.received(m.Reupload(**lease()), 2.0) == []


# -- drain ---------------------------------------------------------------------------------------


def test_drain_gives_back_what_has_not_begun_and_waits_for_the_rest(
    session: WorkerSession,
) -> None:
    session.received(grant("r1"), 1.0)
    session.received(grant("r2"), 1.0)
    session.began(**lease("r1"))
    found = session.drain("SIGUSR2")
    assert kinds(found) == ["draining", "State", "Pull", "kill", "settled", "Return"]
    assert sent(found)[1] == m.Pull(window=0, executors=1)
    assert session.drain("again") == []
    back = sent(session.received(grant("r3"), 2.0))
    assert back == [m.Return(**lease("r3"), reason=LeaseEnd.DRAINED)]
    assert session.changed("warm") == [], "a drain is for good"
    session.finished(done("r1"), 3.0)
    last = session.received(m.Ack(**lease("r1"), accepted=True), 4.0)
    assert kinds(last) == ["settled", "Goodbye", "leave"]
    assert session.link is Link.LEFT
    assert session.tick(100.0) == []
    assert session.received(UNKNOWN, 100.0) == []


def test_when_the_time_is_over_what_runs_is_given_back_and_what_has_ended_is_not(
    session: WorkerSession,
) -> None:
    for name in ("r1", "r2"):
        session.received(grant(name), 1.0)
        session.began(**lease(name))
    session.finished(done("r2"), 2.0)
    found = session.cut_short("walltime", LeaseEnd.WALLTIME)
    assert kinds(found) == ["draining", "State", "Pull", "kill", "settled", "Return"]
    assert sent(found)[-1] == m.Return(**lease("r1"), reason=LeaseEnd.WALLTIME)
    last = session.received(m.Ack(**lease("r2"), accepted=True), 4.0)
    assert kinds(last) == ["settled", "Goodbye", "leave"]


def test_the_time_may_be_over_in_a_drain(session: WorkerSession) -> None:
    session.received(grant("r1"), 1.0)
    session.began(**lease("r1"))
    session.drain("SIGTERM")
    found = session.cut_short("preempted", LeaseEnd.PREEMPTED)
    assert kinds(found) == ["kill", "settled", "Return", "Goodbye", "leave"]
    assert session.cut_short("preempted", LeaseEnd.PREEMPTED) == []


def test_drain_while_greeting_leaves_when_nothing_is_held(fresh: WorkerSession) -> None:
    assert kinds(fresh.drain("SIGTERM")) == ["draining", "leave"]


def test_drain_while_greeting_keeps_a_finished_result(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    session.finished(done(), 1.0)
    session.connected(2.0)
    assert kinds(session.drain("SIGTERM")) == ["draining"]
    (hello,) = sent(session.connected(3.0))
    assert isinstance(hello, m.Hello)
    assert hello.state == "draining"
    keep = m.Welcome(**_fields(WELCOME) | {"keep": hello.held})
    assert kinds(session.received(keep, 4.0)) == ["welcomed", "Done", "Pull"]
    last = session.received(m.Ack(**lease(), accepted=True), 5.0)
    assert kinds(last) == ["settled", "Goodbye", "leave"]


def test_a_drain_by_order_and_by_welcome(session: WorkerSession) -> None:
    assert kinds(session.received(m.Drain(reason="ordered"), 1.0))[-2:] == ["Goodbye", "leave"]
    other = WorkerSession(nonce="n2", window=0, executors=1)
    other.connected(0.0)
    found = other.received(m.Welcome(**_fields(WELCOME) | {"drain": True}), 1.0)
    assert kinds(found)[-2:] == ["Goodbye", "leave"]


def test_an_abandoned_lease_ends_a_drain(session: WorkerSession) -> None:
    session.received(grant(), 1.0)
    session.began(**lease())
    session.drain("SIGTERM")
    found = session.received(m.Abandon(**lease()), 2.0)
    assert kinds(found) == ["kill", "settled", "Goodbye", "leave"]


def _fields(message: m.Message) -> dict[str, Any]:
    return {name: getattr(message, name) for name in message.__struct_fields__}


# -- how far things are ------------------------------------------------------------------------------


def test_a_load_is_told_again_to_a_relay_that_was_started_since(fresh: WorkerSession) -> None:
    assert fresh.changed("loading", detail="placing", done=1, total=4) == [], "nobody listens yet"
    [state] = [each for each in sent(fresh.received(WELCOME, 0.0)) if isinstance(each, m.State)]
    assert (state.detail, state.done, state.total) == ("placing", 1, 4)
    fresh.warm(executors=1, facts={})
    fresh.connected(1.0)
    assert "State" not in kinds(fresh.received(WELCOME, 1.0)), "a Hello says that it is warm"


def test_a_heartbeat_says_how_much_of_a_result_is_up(session: WorkerSession) -> None:
    session.received(grant(), 0.0)
    session.began(**lease())
    session.uploading(**lease(), sent=3, size=9)
    session.uploading(**lease("r2"), sent=1, size=9)
    [beat] = sent(session.tick(2 * BEAT_S))
    assert beat == m.Renew(held=[m.Held(**lease(), started=True, sent=3, size=9)])
