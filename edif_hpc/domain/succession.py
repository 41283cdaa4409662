"""Slots and their generations: who is ordered, who drains, who is cancelled, and why nothing happens.

A slot is one wanted replica. An allocation fills it for one walltime; before that ends a *successor*, the next
generation, must be warm. Per slot there is at most one successor at a time:

    no generation           ORDER one, if the governor permits
    it waits to start       WAIT; the scheduler's reason says for what
    it serves               WAIT until what is left of its walltime is shorter than the lead, then ORDER the successor
    the successor is warm   DRAIN the old one: it finishes what runs, and leaves
    the end comes first     DRAIN when too little is left for any request
    a limit on running jobs keeps the successor waiting: DRAIN once no typical request fits, so that it may begin
    more than one successor, or a slot that nobody wants: CANCEL what waits, DRAIN what runs
    it can never start as it was asked for, and an operator has asked anew: CANCEL

The lead is learned (`domain.learning`). If it is as long as the walltime, a successor is ordered as soon as its predecessor
starts, and even so the slot will be empty for a while: `gap_s` says how long, `advice` how many replicas hide it.

Generations of one deployment are staggered over the walltime, so that they do not all change at once. A new one whose end
would fall on another's gets a shorter walltime (shorter jobs also start sooner); where the lead leaves no room for that, it
begins later instead. Only the end of a generation is moved: each successor keeps the distance that its slot has.

Pure: facts in, decisions out, and the same facts give the same decision, so that a relay that was started anew goes on.
`relay.slots` carries out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edif_hpc.domain.allocation import PENDING, RUNNING, AllocationState
from edif_hpc.domain.dispatch import END_MARGIN_S
from edif_hpc.domain.governor import Permit
from edif_hpc.domain.learning import Times
from edif_hpc.domain.pending import Hindrance, understand

_RANK = {AllocationState.ORDERED: 0, AllocationState.SUBMITTED: 1}
_RANK |= {AllocationState.STARTED: 2, AllocationState.LOADING: 3, AllocationState.WARM: 4}


@dataclass(frozen=True, kw_only=True)
class Member:
    """A live allocation of a slot. `left_s` is what is left of its walltime, once it runs."""

    allocation: str
    generation: int
    state: AllocationState
    walltime_s: float | None
    left_s: float | None = None
    age_s: float = 0.0  #: since it was ordered, or submitted
    held: bool = False  #: somebody has taken its order
    reason: str = ""  #: why the scheduler lets it wait
    start_in_s: float | None = None  #: the scheduler's own estimate

    @property
    def pending(self) -> bool:
        """Whether its job has not begun."""
        return self.state in PENDING

    @property
    def runs(self) -> bool:
        """Whether it runs and was not told to leave."""
        return self.state in RUNNING


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One wanted replica and all its live allocations."""

    index: int
    members: tuple[Member, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What an operator wants of a deployment. No walltime: the relay orders nothing."""

    replicas: int
    walltime_s: float | None
    permit: Permit = field(default_factory=Permit)
    margin_s: float = END_MARGIN_S  #: so long before its end a worker leaves
    up_s: float = math.inf  #: since an operator last said `up`


@dataclass(frozen=True, kw_only=True)
class Order:
    """Have the next generation submitted."""

    slot: int
    walltime_s: float
    begin_after_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Drain:
    """Tell a running allocation to finish and leave."""

    allocation: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Take a pending allocation out of the scheduler's queue."""

    allocation: str
    why: str


Action = Order | Drain | Cancel


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What follows for one slot, and why."""

    slot: int
    actions: tuple[Action, ...] = ()
    why: str = ""
    gap_s: float = 0.0  #: how long the slot is expected to be empty at each end of a walltime
    advice: str = ""


def plan(slots: Sequence[Slot], wanted: Wanted, times: Times) -> list[Decision]:
    """Decide for all slots of one deployment; what one orders counts for the stagger of the next."""
    ends = {slot.index: _end_of(slot, times) for slot in slots}
    made = []
    for slot in sorted(slots, key=lambda each: each.index):
        others = [end for index, end in ends.items() if index != slot.index and end is not None]
        decision = _decide(slot, wanted, times, others)
        for action in decision.actions:
            if isinstance(action, Order):
                ends[slot.index] = times.wait_s + action.begin_after_s + action.walltime_s
        made.append(decision)
    return made


def _decide(slot: Slot, wanted: Wanted, times: Times, ends: Iterable[float]) -> Decision:
    live = [each for each in slot.members if each.pending or each.runs]
    if slot.index >= wanted.replicas:
        gone = tuple(_let_go(each, "nobody wants it any more") for each in live)
        return Decision(slot=slot.index, actions=gone, why="not wanted")
    incumbent, successor, surplus = _sort(live)
    tidy = tuple(
        _let_go(each, f"generation {_newest(incumbent, successor)} takes its place")
        for each in surplus
    )
    gap_s, advice = outlook(wanted, times)
    if incumbent is None:
        actions, why = _fill(slot, wanted, times, ends)
    else:
        actions, why = _keep(slot, incumbent, successor, wanted, times, ends)
        advice = _hint(incumbent, successor) or advice
    return Decision(
        slot=slot.index, actions=(*tidy, *actions), why=why, gap_s=gap_s, advice=advice
    )


def _sort(live: Sequence[Member]) -> tuple[Member | None, Member | None, list[Member]]:
    """Who serves (or comes first), who follows, and who is one too many."""
    warm = [each for each in live if each.state is AllocationState.WARM]
    first = max(live, key=_standing, default=None)
    incumbent = max(warm, key=lambda each: each.generation, default=first)
    if incumbent is None:
        return None, None, []
    newer = [each for each in live if each.generation > incumbent.generation]
    successor = max(newer, key=_standing, default=None)
    return incumbent, successor, [e for e in live if e not in (incumbent, successor)]


def _standing(member: Member) -> tuple[bool, int, int]:
    """How far along it is; of equals, the older."""
    return member.runs, _RANK[member.state], -member.generation


def _newest(*members: Member | None) -> int:
    return max(each.generation for each in members if each is not None)


def _let_go(member: Member, why: str) -> Action:
    if member.pending:
        return Cancel(allocation=member.allocation, why=why)
    return Drain(allocation=member.allocation, why=why)


def _fill(
    slot: Slot, wanted: Wanted, times: Times, ends: Iterable[float]
) -> tuple[tuple[Action, ...], str]:
    if wanted.walltime_s is None:
        return (), "empty; an operator fills it with `edif-hpc up`"
    if not wanted.permit.granted:
        return (), _not_permitted(wanted.permit)
    begin_after_s, walltime_s = staggered(wanted, times, ends, may_wait=True)
    order = Order(slot=slot.index, walltime_s=walltime_s, begin_after_s=begin_after_s)
    return (order,), "empty; a generation is ordered"


def _keep(
    slot: Slot,
    incumbent: Member,
    successor: Member | None,
    wanted: Wanted,
    times: Times,
    ends: Iterable[float],
) -> tuple[tuple[Action, ...], str]:
    if incumbent.pending:
        return _pending(incumbent, wanted)
    left_s = incumbent.left_s
    if left_s is None:
        return (), "serves without an end"
    if left_s <= wanted.margin_s:
        why = f"its walltime ends in {left_s:.0f} s"
        return (Drain(allocation=incumbent.allocation, why=why),), why
    if successor is not None:
        return _hand_over(incumbent, successor, left_s, wanted, times)
    return _follow(slot, left_s, wanted, times, ends)


def _follow(
    slot: Slot, left_s: float, wanted: Wanted, times: Times, ends: Iterable[float]
) -> tuple[tuple[Action, ...], str]:
    if wanted.walltime_s is None:
        return (), f"serves for another {minutes(left_s)}; nobody wants a successor"
    if left_s > times.lead_s:
        due_s = left_s - times.lead_s
        return (), f"serves; its successor is ordered in {minutes(due_s)}"
    if not wanted.permit.granted:
        return (), _not_permitted(wanted.permit)
    _, walltime_s = staggered(wanted, times, ends, may_wait=False)
    return (Order(slot=slot.index, walltime_s=walltime_s),), "its successor is ordered"


def _hand_over(
    incumbent: Member, successor: Member, left_s: float, wanted: Wanted, times: Times
) -> tuple[tuple[Action, ...], str]:
    """The old one serves on until the new one is warm, unless that one waits for it to end."""
    if not successor.pending:
        return (), f"serves until generation {successor.generation} is warm"
    withdrawn, waits = _pending(successor, wanted)
    if withdrawn:
        return withdrawn, f"serves; {waits}"
    blocked = understand(successor.reason).kind is Hindrance.LIMIT
    if blocked and left_s <= times.request_s + wanted.margin_s:
        why = f"generation {successor.generation} can only start when it has left ({successor.reason})"
        return (Drain(allocation=incumbent.allocation, why=why),), why
    if blocked:
        why = f"serves; generation {successor.generation} cannot start beside it ({successor.reason}): expect a gap"
        return (), why
    return (), f"serves; generation {successor.generation} {waits}"


def _pending(member: Member, wanted: Wanted) -> tuple[tuple[Action, ...], str]:
    """One that has not begun waits, or is withdrawn.

    An order that nobody has taken is, when it is not permitted any more; so is a job that can never start as it was asked
    for, once an operator has said what else he wants.
    """
    if member.state is AllocationState.ORDERED and not (member.held or wanted.permit.granted):
        why = _not_permitted(wanted.permit)
        return (Cancel(allocation=member.allocation, why=why),), why
    if member.age_s > wanted.up_s and understand(member.reason).kind is Hindrance.NEVER:
        why = f"it cannot start as it was asked for ({member.reason}), and `up` was said since"
        return (Cancel(allocation=member.allocation, why=why),), why
    return (), waits_for(member)


def _not_permitted(permit: Permit) -> str:
    if permit.paused:
        return f"{permit.reason}. Mend it, then: edif-hpc up"
    return f"the next one is ordered in {minutes(permit.wait_s)}; {permit.reason}"


def waits_for(member: Member) -> str:
    """What a pending allocation waits for."""
    if member.state is AllocationState.ORDERED:
        who = "is being submitted" if member.held else "waits for a launcher to submit it"
        return f"{who} ({minutes(member.age_s)})"
    reason = f" ({member.reason})" if member.reason else ""
    start = "" if member.start_in_s is None else f", may start in {minutes(member.start_in_s)}"
    return f"waits in the scheduler's queue{reason}{start}"


def _hint(*members: Member | None) -> str:
    """Advice from the scheduler's reasons."""
    reasons = (each.reason for each in members if each is not None and each.pending)
    return next((hint for reason in reasons if (hint := understand(reason).advice)), "")


def outlook(wanted: Wanted, times: Times) -> tuple[float, str]:
    """The gap to expect at each end of a walltime, and what would hide it."""
    walltime_s = wanted.walltime_s
    if walltime_s is None or times.lead_s < walltime_s:
        return 0.0, ""
    gap_s = times.lead_s - walltime_s
    useful_s = walltime_s - times.warmup_s - times.request_s - wanted.margin_s
    if useful_s <= 0:
        return gap_s, (
            f"a walltime of {minutes(walltime_s)} is too short: loading takes {minutes(times.warmup_s)}, "
            f"a request {minutes(times.request_s)}; ask for a longer one"
        )
    cycle_s = max(walltime_s, times.wait_s)
    enough = math.ceil(cycle_s / useful_s)
    if enough <= wanted.replicas:
        return gap_s, ""
    return gap_s, (
        f"jobs wait about {minutes(times.wait_s)} and may run {minutes(walltime_s)}: expect a gap of "
        f"{minutes(gap_s)}; {enough} staggered replicas would hide it"
    )


# -- the stagger ---------------------------------------------------------------------------------


def staggered(
    wanted: Wanted, times: Times, ends: Iterable[float], *, may_wait: bool
) -> tuple[float, float]:
    """`(begin_after_s, walltime_s)` that keep a generation's end away from the others'.

    Ends repeat with the walltime, so distances are taken around that circle. It is divided into as many parts as there are
    replicas; an end has to be half a part away from the others.
    """
    if wanted.walltime_s is None:
        raise ValueError("without a walltime there is nothing to stagger")
    whole_s, others = wanted.walltime_s, list(ends)
    part_s = whole_s / max(1, wanted.replicas)
    steps = [step * part_s for step in range(max(1, wanted.replicas))]

    def free(end_s: float) -> bool:
        apart = ((end_s - other) % whole_s for other in others)
        return all(min(each, whole_s - each) >= part_s / 2 for each in apart)

    for cut_s in steps:
        if whole_s - cut_s >= 2 * times.lead_s and free(times.wait_s + whole_s - cut_s):
            return 0.0, whole_s - cut_s
    for delay_s in steps if may_wait else ():
        if free(times.wait_s + delay_s + whole_s):
            return delay_s, whole_s
    return 0.0, whole_s


def _end_of(slot: Slot, times: Times) -> float | None:
    """When the newest generation of a slot ends, in seconds from now."""
    live = [each for each in slot.members if each.pending or each.runs]
    newest = max(live, key=lambda each: each.generation, default=None)
    if newest is None or newest.left_s is not None or newest.walltime_s is None:
        return None if newest is None else newest.left_s
    rest_s = max(0.0, times.wait_s - newest.age_s)
    return (rest_s if newest.start_in_s is None else newest.start_in_s) + newest.walltime_s


def minutes(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
