"""The life of an allocation, and the name by which the scheduler's jobs are known as ours."""

from __future__ import annotations

import itertools

import pytest

from edif_hpc.domain.allocation import (
    TRANSITIONS,
    Allocation,
    AllocationState,
    check_transition,
)
from edif_hpc.errors import TransitionRefused

A = AllocationState

LISTED = {
    (A.ORDERED, A.SUBMITTED),
    (A.ORDERED, A.STARTED),
    (A.ORDERED, A.ENDED),
    (A.SUBMITTED, A.STARTED),
    (A.SUBMITTED, A.ENDED),
    (A.STARTED, A.LOADING),
    (A.STARTED, A.DRAINING),
    (A.STARTED, A.ENDED),
    (A.LOADING, A.WARM),
    (A.LOADING, A.DRAINING),
    (A.LOADING, A.ENDED),
    (A.WARM, A.LOADING),
    (A.WARM, A.DRAINING),
    (A.WARM, A.ENDED),
    (A.DRAINING, A.ENDED),
}


@pytest.mark.parametrize(("old", "new"), list(itertools.product(A, A)))
def test_a_transition_is_listed_or_raises(old: AllocationState, new: AllocationState) -> None:
    if (old, new) in LISTED:
        check_transition("a1", old, new)
    else:
        with pytest.raises(TransitionRefused, match=f"allocation a1 is {old}; .* become {new}"):
            check_transition("a1", old, new)


def test_every_life_can_end_and_an_end_is_final() -> None:
    assert set(TRANSITIONS) == set(A)
    assert all(A.ENDED in TRANSITIONS[state] for state in set(A) - {A.ENDED})
    assert TRANSITIONS[A.ENDED] == frozenset()


def test_the_name_tells_slot_generation_and_a_nonce() -> None:
    allocation = Allocation(
        id="0123456789abcdef",
        deployment="tiny-gpt2",
        slot=2,
        generation=7,
        site="local",
        state=A.SUBMITTED,
        submitted_at=0.0,
    )
    assert allocation.name == "edif-tiny-gpt2-2-7-01234567"
