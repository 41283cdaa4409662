"""Which worker, which lease to steal, and a queue in which nobody starves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.dispatch import (
    PREFETCH_WITHIN_S,
    FairQueue,
    Prefetched,
    Seat,
    Waiting,
    choose,
    choose_seat,
    choose_steal,
)


def seat(
    peer: str, *, executors: int = 1, held: int = 0, window: int = 2, busy_for_s: float = 0.0
) -> Seat:
    return Seat(peer=peer, executors=executors, held=held, window=window, busy_for_s=busy_for_s)


@pytest.mark.parametrize(
    ("one", "idle", "may_prefetch"),
    [
        (seat("w"), True, False),
        (seat("w", window=0), False, False),  # it drains
        (seat("w", executors=2, held=1), True, False),
        (seat("w", held=1, busy_for_s=PREFETCH_WITHIN_S), False, True),
        (seat("w", held=1, busy_for_s=PREFETCH_WITHIN_S + 0.1), False, False),
        (seat("w", held=2), False, False),
        (seat("w", executors=4, held=1, window=1), False, False),
    ],
)
def test_a_seat_is_idle_or_may_prefetch(one: Seat, *, idle: bool, may_prefetch: bool) -> None:
    assert (one.idle, one.may_prefetch) == (idle, may_prefetch)


@pytest.mark.parametrize(
    ("seats", "chosen"),
    [
        ([], None),
        ([seat("a", held=2)], None),
        ([seat("b"), seat("a")], "a"),
        ([seat("a", executors=4, held=2, window=4), seat("b", executors=4, window=4)], "b"),
        ([seat("a", held=1, busy_for_s=0.1), seat("b")], "b"),  # idle goes before prefetch
        ([seat("a", held=1, busy_for_s=1.0), seat("b", held=1, busy_for_s=0.5)], "b"),
        ([seat("a", held=1, busy_for_s=3600.0)], None),  # nobody waits behind an hour's run
    ],
)
def test_the_seat_for_the_next_request(seats: list[Seat], chosen: str | None) -> None:
    found = choose_seat(seats)
    assert (found.peer if found else None) == chosen


def prefetched(request: str, holder: str, busy_for_s: float) -> Prefetched:
    return Prefetched(request=request, holder=holder, holder_busy_for_s=busy_for_s)


@pytest.mark.parametrize(
    ("seats", "taken_ahead", "stolen"),
    [
        ([seat("a", held=2)], [prefetched("r1", "a", 9.0)], None),  # nobody idles
        ([seat("a")], [], None),
        ([seat("a")], [prefetched("r1", "b", 1.0), prefetched("r2", "c", 5.0)], "r2"),
        ([seat("a")], [prefetched("r1", "b", 0.0)], None),  # it is about to start there
        ([seat("a")], [prefetched("r1", "a", 5.0)], None),
    ],
)
def test_the_lease_to_steal(
    seats: list[Seat], taken_ahead: list[Prefetched], stolen: str | None
) -> None:
    found = choose_steal(seats, taken_ahead)
    assert (found.request if found else None) == stolen


# -- the fair queue ------------------------------------------------------------------------------


def test_owners_take_turns_and_a_returned_request_is_at_the_head_of_its_line() -> None:
    line = FairQueue()
    for seq, owner in enumerate("aaabbc", start=1):
        line.push(Waiting(id=f"{owner}{seq}", seq=seq, owner=owner))
    assert [each.id for each in line.order()] == ["a1", "b4", "c6", "a2", "b5", "a3"]
    first = line.pop()
    assert first is not None
    assert first.id == "a1"
    line.push(first)
    assert [each.id for each in line.order()] == ["b4", "c6", "a1", "b5", "a2", "a3"]


def test_a_request_is_in_the_queue_once() -> None:
    line = FairQueue()
    one = Waiting(id="r1", seq=1, owner="a")
    line.push(one)
    line.push(one)
    assert (len(line), "r1" in line) == (1, True)
    line.remove("r1")
    line.remove("r1")
    assert (len(line), "r1" in line, line.pop(), line.order()) == (0, False, None, [])
    line.push(one)
    assert line.pop() == one
    assert line.pop() is None


@dataclass
class Naive:
    """The same queue, by its definition: the owner served longest ago, and in it the oldest."""

    waiting: list[Waiting] = field(default_factory=list)
    served: list[str] = field(default_factory=list)

    def pop(self) -> Waiting | None:
        if not self.waiting:
            return None
        turns = {owner: turn for turn, owner in enumerate(self.served, start=1)}
        taken = min(self.waiting, key=lambda each: (turns.get(each.owner, 0), each.seq))
        self.waiting.remove(taken)
        self.served.append(taken.owner)
        return taken


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("push"), st.sampled_from("abc")),
        st.tuples(st.just("pop"), st.just("")),
        st.tuples(st.just("put back"), st.integers(0, 9).map(str)),
        st.tuples(st.just("remove"), st.integers(0, 9).map(str)),
    ),
    max_size=40,
)


def play(moves: list[tuple[str, str]]) -> tuple[FairQueue, Naive]:
    """Both queues after the same moves; their answers are compared on the way."""
    line, naive = FairQueue(), Naive()
    taken: list[Waiting] = []
    for seq, (move, what) in enumerate(moves, start=1):
        match move:
            case "push":
                one = Waiting(id=f"r{seq}", seq=seq, owner=what)
                line.push(one)
                naive.waiting.append(one)
            case "pop":
                popped = line.pop()
                assert popped == naive.pop()
                taken += [popped] if popped else []
            case "put back" if int(what) < len(taken):
                back = taken.pop(int(what))
                line.push(back)
                naive.waiting.append(back)
            case "remove" if int(what) < len(naive.waiting):
                line.remove(naive.waiting.pop(int(what)).id)
    return line, naive


@given(MOVES)
def test_the_queue_is_as_its_definition(moves: list[tuple[str, str]]) -> None:
    line, naive = play(moves)
    assert len(line) == len(naive.waiting)
    order = line.order()
    assert [naive.pop() for _ in order] == order
    assert naive.pop() is None


@given(MOVES)
def test_the_order_is_that_of_taking(moves: list[tuple[str, str]]) -> None:
    line, _ = play(moves)
    order = line.order()
    assert [line.pop() for _ in order] == order
    assert line.pop() is None


@given(MOVES, st.sampled_from("abc"))
def test_nobody_starves(moves: list[tuple[str, str]], owner: str) -> None:
    """Whoever waits is served before anybody else is served twice."""
    line, naive = play(moves)
    if not any(each.owner == owner for each in naive.waiting):
        return
    others: list[str] = []
    while (one := line.pop()) is not None and one.owner != owner:
        others.append(one.owner)
    assert len(others) == len(set(others))


# -- what is left of a walltime ------------------------------------------------------------------


def lived(peer: str, left_s: float | None, **facts: Any) -> Seat:
    return Seat(peer=peer, executors=1, held=0, window=2, left_s=left_s, margin_s=10.0, **facts)


def queued(*waiting: Waiting) -> FairQueue:
    queue = FairQueue()
    for each in waiting:
        queue.push(each)
    return queue


@pytest.mark.parametrize(
    ("facts", "need_s"),
    [
        ({}, 60.0),
        ({"wall_s": 20.0}, 20.0),
        ({"cut_s": 25.0}, 60.0),
        ({"cut_s": 100.0}, 200.0),
        ({"cut_s": 100.0, "wall_s": 150.0}, 150.0),
        ({"cut_s": 4000.0}, 3000.0),
    ],
)
def test_what_a_request_needs(facts: dict[str, float], need_s: float) -> None:
    assert Waiting(id="r", seq=1, owner="a", **facts).need_s(60.0, 3000.0) == need_s


def test_a_request_goes_where_it_ends_in_time() -> None:
    one = Waiting(id="r", seq=1, owner="a")
    assert choose(queued(one), [lived("w", 69.9)], usual_s=60.0) is None
    found = choose(queued(one), [lived("v", 69.9), lived("w", 70.0)], usual_s=60.0)
    assert found is not None
    assert found[1].peer == "w"
    assert choose(queued(one), [lived("w", None)], usual_s=1e9) is not None


def test_work_before_it_counts_when_it_is_taken_ahead() -> None:
    one = Waiting(id="r", seq=1, owner="a")
    ahead = replace(lived("w", 71.0), held=1, busy_for_s=2.0)
    assert choose(queued(one), [ahead], usual_s=60.0) is None
    assert choose(queued(one), [replace(ahead, left_s=72.0)], usual_s=60.0) is not None


def test_the_next_that_fits_goes_first_and_the_other_keeps_its_place() -> None:
    long = Waiting(id="long", seq=1, owner="a")
    short = Waiting(id="short", seq=2, owner="a", wall_s=5.0)
    later = Waiting(id="later", seq=3, owner="a", wall_s=5.0)
    queue = queued(long, short, later)
    found = choose(queue, [lived("w", 20.0)], usual_s=60.0)
    assert found is not None
    assert found[0] == short
    assert queue.order() == [long, later]
    queue.push(short)  # it comes back
    assert queue.order() == [long, short, later]
    assert [queue.pop() for _ in range(4)] == [long, short, later, None]


def test_one_owners_long_request_does_not_hold_up_another() -> None:
    queue = queued(
        Waiting(id="long", seq=1, owner="a"), Waiting(id="short", seq=2, owner="b", wall_s=5.0)
    )
    found = choose(queue, [lived("w", 20.0)], usual_s=60.0)
    assert found is not None
    assert found[0].id == "short"


def test_nothing_is_stolen_for_a_worker_that_ends() -> None:
    taken = Prefetched(request="r", holder="busy", holder_busy_for_s=5.0)
    assert choose_steal([lived("w", 69.0)], [taken], usual_s=60.0) is None
    assert choose_steal([lived("w", 70.0)], [taken], usual_s=60.0) == taken


@given(
    walls=st.lists(st.floats(1.0, 100.0), max_size=12),
    lives=st.lists(st.none() | st.floats(0.0, 120.0), max_size=4),
)
def test_what_can_be_granted_is_and_only_that(
    walls: list[float], lives: list[float | None]
) -> None:
    waiting = [
        Waiting(id=f"r{seq}", seq=seq, owner="ab"[seq % 2], wall_s=wall)
        for seq, wall in enumerate(walls)
    ]
    queue, seats = queued(*waiting), [lived(f"w{n}", left_s) for n, left_s in enumerate(lives)]
    while seats and (found := choose(queue, seats, usual_s=50.0)) is not None:
        chosen, seat = found
        assert seat.fits(chosen.need_s(50.0))
        seats.remove(seat)
    left = queue.order()
    assert not any(seat.fits(each.need_s(50.0)) for seat in seats for each in left)
