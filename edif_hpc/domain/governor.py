"""How often we may submit, and where. A scheduler that is flooded bans its user, and a broken model burns GPU-hours.

Three brakes, each pure: past facts in, permission out.

- `Tokens`: so many submissions per window and site. A token that was taken comes back when the window has passed, so no
  window of that length ever sees more.
- `permit`: after an allocation that died before it was warm, the next one waits: not at all after the first, then 1, 5, 15,
  60 minutes. The third in a row pauses the deployment until an operator says `up` again; so does a submission that the
  scheduler will never take. One allocation that gets warm clears the count.
- `bad_nodes`: a node where two died within a day is left out, unless their deployments got warm nowhere: then it is not the node,
  and leaving it out would in the end leave out the whole cluster. It is taken in again when one gets warm there, and when an
  operator says `up` of what died there: he has mended something.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from edif_hpc.domain.allocation import Allocation

SUBMITS = 4
WINDOW_S = 600.0
BACK_OFF_S = (0.0, 60.0, 300.0, 900.0, 3600.0)
PAUSE_AFTER = 3
BAD_NODE_DEATHS = 2
BAD_NODE_S = 24 * 3600.0

CANCELLED = "cancelled"
AWAY = "the relay was away when its pilot wanted to join"
REFUSED = "refused by the scheduler"
#: Ends that say nothing against a deployment or a node: we wanted them, or caused them.
_WANTED_ENDS = frozenset({"drained", CANCELLED, AWAY, "refused by the relay"})
_WORDS = 300


def back_off_s(failures: int) -> float:
    """How long to wait after so many failures in a row."""
    return BACK_OFF_S[min(failures - 1, len(BACK_OFF_S) - 1)] if failures > 0 else 0.0


@dataclass(kw_only=True)
class Tokens:
    """Submissions to one site. Times are monotonic seconds."""

    limit: int = SUBMITS
    window_s: float = WINDOW_S
    _taken: deque[float] = field(default_factory=deque)

    def free(self, now: float) -> int:
        """How many may be submitted now."""
        while self._taken and now - self._taken[0] >= self.window_s:
            self._taken.popleft()
        return max(0, self.limit - len(self._taken))

    def take(self, now: float) -> None:
        """One is (perhaps) being submitted."""
        self._taken.append(now)

    def next_in_s(self, now: float) -> float:
        """When the next token is there."""
        if self.free(now):
            return 0.0
        return self._taken[len(self._taken) - self.limit] + self.window_s - now


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How one allocation began. `at` is when that was known, wall clock."""

    at: float
    warm: bool
    deployment: str = ""
    cause: str = ""
    node: str | None = None
    final: bool = False  #: trying again cannot help


def trial_of(allocation: Allocation) -> Trial | None:
    """What an allocation says about its deployment; None while it is open, or when we ended it ourselves."""
    if allocation.warm_at is not None:
        return Trial(
            at=allocation.warm_at,
            warm=True,
            deployment=allocation.deployment,
            node=allocation.node,
        )
    cause = allocation.cause or "unknown"
    if allocation.ended_at is None or cause in _WANTED_ENDS:
        return None
    last = allocation.detail.strip().splitlines()[-3:]
    words = f"{cause}: {' | '.join(last)}" if last else cause
    return Trial(
        at=allocation.ended_at,
        warm=False,
        deployment=allocation.deployment,
        cause=words[-_WORDS:],
        node=allocation.node,
        final=cause == REFUSED,
    )


def trials(allocations: Iterable[Allocation]) -> list[Trial]:
    """How allocations began, of those that say something."""
    return [trial for each in allocations if (trial := trial_of(each)) is not None]


@dataclass(frozen=True, kw_only=True)
class Permit:
    """Whether a deployment may have another allocation now."""

    wait_s: float = 0.0
    paused: bool = False
    reason: str = ""

    @property
    def granted(self) -> bool:
        """Whether it may."""
        return not self.paused and self.wait_s <= 0


def permit(trials: Iterable[Trial], *, now: float, since: float) -> Permit:
    """Judge a deployment by how its allocations began after `since`, the operator's last `up`."""
    deaths: list[Trial] = []
    for trial in sorted(trials, key=lambda each: each.at, reverse=True):
        if trial.warm or trial.at < since:
            break
        deaths.append(trial)
    if not deaths:
        return Permit()
    last = deaths[0]
    if last.final:
        return Permit(paused=True, reason=f"paused: {last.cause}")
    if len(deaths) >= PAUSE_AFTER:
        return Permit(
            paused=True,
            reason=f"paused: {len(deaths)} allocations in a row died before they were warm; "
            f"the last: {last.cause}",
        )
    wait_s = max(0.0, last.at + back_off_s(len(deaths)) - now)
    return Permit(wait_s=wait_s, reason=f"the last one died before it was warm: {last.cause}")


def bad_nodes(
    trials: Iterable[Trial], *, now: float, since: Mapping[str, float] = MappingProxyType({})
) -> tuple[str, ...]:
    """Nodes to leave out: where several allocations died lately, of deployments that got warm elsewhere.

    `since` is the operator's last `up` of each deployment.
    """
    lately = sorted(
        (each for each in trials if now - each.at < BAD_NODE_S), key=lambda each: each.at
    )
    sound = {each.deployment for each in lately if each.warm}
    deaths: Counter[str] = Counter()
    for each in lately:
        if each.node is None:
            continue
        if each.warm:
            deaths[each.node] = 0
        elif each.deployment in sound and each.at >= since.get(each.deployment, 0.0):
            deaths[each.node] += 1
    return tuple(sorted(node for node, count in deaths.items() if count >= BAD_NODE_DEATHS))
