from __future__ import annotations

import pytest

from edif_hpc.clock import Clock, SystemClock
from edif_hpc.testing.clock import ManualClock


def test_stands_still_until_moved() -> None:
    clock = ManualClock(monotonic_s=5.0, wall_s=100.0)
    assert (clock.monotonic(), clock.wall()) == (5.0, 100.0)
    clock.advance(2.5)
    assert (clock.monotonic(), clock.wall()) == (7.5, 102.5)


def test_only_the_wall_jumps() -> None:
    clock = ManualClock(monotonic_s=5.0, wall_s=100.0)
    clock.set_wall(40.0)
    assert (clock.monotonic(), clock.wall()) == (5.0, 40.0)
    with pytest.raises(ValueError, match="does not go back"):
        clock.advance(-1)


@pytest.mark.parametrize("clock", [SystemClock(), ManualClock()])
def test_both_clocks_are_clocks(clock: Clock) -> None:
    before = clock.monotonic()
    assert clock.monotonic() >= before
    assert clock.wall() > 1_600_000_000
