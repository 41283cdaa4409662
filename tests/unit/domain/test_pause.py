"""A worker that gives leases back waits longer each time."""

from __future__ import annotations

import pytest

from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.domain.pause import FIRST_S, LONGEST_S, Pause


def test_the_pause_doubles_up_to_its_longest() -> None:
    pause, seen = Pause(), []
    for _ in range(40):
        pause = pause.after(LeaseEnd.RELEASED, 100.0)
        seen.append(pause.left_s(100.0))
    assert seen[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert seen[-1] == LONGEST_S
    assert seen == sorted(seen)


def test_it_ends_by_itself() -> None:
    pause = Pause().after(LeaseEnd.UNKNOWN, 100.0)
    assert pause.left_s(100.0 + FIRST_S / 2) == FIRST_S / 2
    assert pause.left_s(100.0 + FIRST_S) == 0.0
    assert Pause().left_s(0.0) == 0.0


@pytest.mark.parametrize("end", LeaseEnd)
def test_what_the_relay_took_back_and_what_ran_is_no_reason(end: LeaseEnd) -> None:
    paused = Pause().after(end, 0.0).returns == 1
    assert paused is (end not in {"stolen", "executor_crash", "oom"})
