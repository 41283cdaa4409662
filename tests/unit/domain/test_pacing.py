"""How fast, how many, how slowly, and who is one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.pacing import BURST_S, Flow, Rates, Shares, origin
from edif_hpc.errors import TooMany


def test_a_burst_goes_and_then_the_rate() -> None:
    rates = Rates(rate=2.0)
    assert [rates.take("a", 0.0)[0] for _ in range(21)] == [True] * 20 + [False]
    assert rates.take("a", 0.0) == (False, 0.5)
    assert rates.take("b", 0.0) == (True, 0.0)
    assert rates.take("a", 0.5) == (True, 0.0)
    assert rates.take("a", 0.5) == (False, 0.5)
    assert [rates.take("a", 1000.0)[0] for _ in range(21)] == [True] * 20 + [False]


def test_who_is_patient_gets_a_place() -> None:
    rates = Rates(rate=1.0)
    waits = [rates.take("a", 0.0, patience_s=3.0) for _ in range(15)]
    assert waits[9:] == [
        (True, 0.0),
        (True, 1.0),
        (True, 2.0),
        (True, 3.0),
        (False, 4.0),
        (False, 4.0),
    ]


@given(
    rate=st.floats(0.1, 1000),
    pauses=st.lists(st.floats(0, 20), min_size=1, max_size=200),
    patience=st.floats(0, 10),
)
def test_no_window_sees_more_than_the_burst_and_the_rate(
    rate: float, pauses: list[float], patience: float
) -> None:
    rates, now, served = Rates(rate=rate), 0.0, []
    for pause in pauses:
        now += pause
        may, wait = rates.take("a", now, patience_s=patience)
        if may:
            served.append(now + wait)
    for first in range(len(served)):
        for last in range(first, len(served)):
            allowed = rate * (BURST_S + served[last] - served[first]) + 1
            assert last - first + 1 <= allowed + 1e-6


def test_it_remembers_no_more_than_it_may() -> None:
    rates = Rates(rate=1.0, remembered=3)
    for number in range(100):
        rates.take(str(number), 0.0)
    assert len(rates._full_at) == 3


def test_shares() -> None:
    shares = Shares(limit=2)
    with shares.hold("a", "too many"), shares.hold("a", "too many"):
        with pytest.raises(TooMany, match="too many"), shares.hold("a", "too many"):
            pass
        assert shares.take("b")
        assert shares.held("a") == 2
    assert shares.held("a") == 0
    shares.give("b")
    assert not shares._held


def test_a_stall_is_forgiven_and_a_trickle_is_not() -> None:
    flow = Flow(stall_s=60, slowest=1000)
    assert flow.moves(59, 0)
    assert flow.moves(10, 100_000), "credit comes back"
    assert flow.moves(59, 0)
    assert not flow.moves(2, 10)
    trickle = Flow(stall_s=60, slowest=1000)
    looks = [trickle.moves(15, 15) for _ in range(6)]
    assert looks == [True, True, True, True, False, False]
    fast = Flow(stall_s=60, slowest=1000)
    fast.moves(1, 1 << 40)
    assert not fast.moves(61, 0), "what was fast before buys no hours of silence"


@pytest.mark.parametrize(
    ("host", "who"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("unknown", "unknown"),
        ("x" * 1000, "x" * 64),
    ],
)
def test_who_is_one(host: str, who: str) -> None:
    assert origin(host) == who
