"""The brakes on submissions, fed with the relay's facts: `domain.governor` decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from edif_hpc.clock import Clock
from edif_hpc.domain import governor
from edif_hpc.domain.allocation import Allocation
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.governor import Permit, Tokens


class Governing:
    """Who may be submitted, how often and where.

    `history` gives all allocations known, ended and live; `deployments` all there are; `taken` when orders of a site were given out before this process
    began (wall clock).
    """

    def __init__(
        self,
        *,
        history: Callable[[], Iterable[Allocation]],
        deployments: Callable[[], Iterable[Deployment]],
        taken: Callable[[str], Iterable[float]],
        clock: Clock,
        submits: int,
    ) -> None:
        self._history, self._deployments, self._taken = history, deployments, taken
        self._clock, self._submits = clock, submits
        self._tokens: dict[str, Tokens] = {}

    def permit(self, deployment: Deployment) -> Permit:
        """Whether a deployment may have another allocation."""
        trials = governor.trials(
            each
            for each in self._history()
            if (each.deployment, each.site) == (deployment.name, deployment.site)
        )
        return governor.permit(trials, now=self._clock.wall(), since=deployment.up_at or 0.0)

    def bad_nodes(self, site: str) -> tuple[str, ...]:
        """Nodes of a site to leave out."""
        trials = governor.trials(each for each in self._history() if each.site == site)
        since = {each.name: each.up_at or 0.0 for each in self._deployments()}
        return governor.bad_nodes(trials, now=self._clock.wall(), since=since)

    def tokens(self, site: str) -> Tokens:
        """The submissions of a site; those before the relay was started count too."""
        if site not in self._tokens:
            tokens = self._tokens[site] = Tokens(limit=self._submits)
            age_of = self._clock.monotonic() - self._clock.wall()
            for at in sorted(self._taken(site)):
                tokens.take(at + age_of)
        return self._tokens[site]

    def take(self, site: str) -> bool:
        """Use up one submission; False if there is none left for now."""
        now, tokens = self._clock.monotonic(), self.tokens(site)
        if not tokens.free(now):
            return False
        tokens.take(now)
        return True
