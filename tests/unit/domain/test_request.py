"""The life of a request: its table, its closed list of names, what a waiting client is shown."""

from __future__ import annotations

import itertools

import pytest

from edif_hpc.domain.request import (
    LEASED,
    STORED,
    TERMINAL,
    TRANSITIONS,
    Failure,
    FailureKind,
    Limits,
    Provision,
    Request,
    RequestState,
    check_transition,
    shown_state,
)
from edif_hpc.errors import TransitionRefused

S = RequestState

LISTED = {
    (S.RECEIVED, S.QUEUED),
    (S.QUEUED, S.DISPATCHED),
    (S.QUEUED, S.ERROR),
    (S.DISPATCHED, S.RUNNING),
    (S.DISPATCHED, S.QUEUED),
    (S.DISPATCHED, S.COMPLETED),
    (S.DISPATCHED, S.ERROR),
    (S.RUNNING, S.QUEUED),
    (S.RUNNING, S.COMPLETED),
    (S.RUNNING, S.ERROR),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(S, S)))
def test_a_transition_is_listed_or_raises(old: RequestState, new: RequestState) -> None:
    if (old, new) in LISTED:
        check_transition("r1", old, new)
    else:
        with pytest.raises(TransitionRefused, match=f"request r1 is {old}; .* become {new}"):
            check_transition("r1", old, new)


def test_the_table_knows_every_state_and_what_ends_stays_ended() -> None:
    assert set(TRANSITIONS) == set(S)
    assert {state for state in STORED if not TRANSITIONS[state]} == TERMINAL
    assert LEASED < STORED


def test_the_names_are_those_that_the_client_knows() -> None:
    """Its list is closed: any other string kills the client."""
    known = "RECEIVED QUEUED PROVISIONING DEPLOYING DISPATCHED RUNNING COMPLETED ERROR"
    assert [str(state) for state in S] == known.split()


@pytest.mark.parametrize(
    ("provision", "shown"),
    [
        (Provision.NONE, S.PROVISIONING),
        (Provision.PENDING, S.PROVISIONING),
        (Provision.LOADING, S.DEPLOYING),
        (Provision.WARM, S.QUEUED),
    ],
)
def test_a_queued_request_shows_what_it_waits_for(
    provision: Provision, shown: RequestState
) -> None:
    assert shown_state(S.QUEUED, provision) is shown
    for other in STORED - {S.QUEUED}:
        assert shown_state(other, provision) is other


def test_a_request_is_terminal_by_its_state() -> None:
    for state in STORED:
        request = Request(
            id="r1",
            seq=1,
            owner="ada",
            deployment="tiny",
            model_key="key",
            compress=False,
            env={},
            blob_bytes=0,
            blob_sha256="",
            limits=Limits(),
            accepted_at=1.0,
            expires_at=2.0,
            keep=False,
            client={},
            state=state,
            attempt=1,
            crashes=0,
        )
        assert request.terminal is (state in {S.COMPLETED, S.ERROR})


def test_a_failure_has_no_shared_details() -> None:
    first, second = (Failure(kind=FailureKind.USER, message="no") for _ in range(2))
    assert first.details == {}
    assert first.details is not second.details
