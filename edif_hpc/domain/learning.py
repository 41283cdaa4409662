"""How long things take at a site, learned from the allocations that were.

A successor has to be ordered so early that it is warm before its predecessor ends: the *lead* is the wait in the scheduler's
queue (80 of 100 waits are shorter; it begins with the order, so launchers and our own brakes count), the time from the job's start until the model is warm (90 of 100), the time that the last
requests of the predecessor need (90 of 100), and a margin.

Queue waits belong to a site, warm-ups to a deployment there. While few are known, a conservative prior stands in for each
one that is missing; a wait that lasts at this moment counts as soon as it is longer than what was expected, or a queue that has
just become long would be learned only when it is over.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import quantiles

from edif_hpc.domain.allocation import Allocation
from edif_hpc.domain.estimate import PRIOR_S

WAIT_PRIOR_S = 600.0
WARMUP_PRIOR_S = 180.0
LEAD_MARGIN_S = 120.0
_ENOUGH = 5
_KEPT = 15  #: so that a queue that has emptied is believed after a dozen jobs


@dataclass(frozen=True, kw_only=True)
class Priors:
    """What is expected before anything was seen; an operator who knows the site may say so."""

    wait_s: float = WAIT_PRIOR_S
    warmup_s: float = WARMUP_PRIOR_S
    margin_s: float = LEAD_MARGIN_S  #: of the lead; stays, however much is known


@dataclass(frozen=True, kw_only=True)
class Times:
    """What is expected of the next generation of a deployment."""

    wait_s: float = WAIT_PRIOR_S  #: in the scheduler's queue, p80
    warmup_s: float = WARMUP_PRIOR_S  #: from the job's start until warm, p90
    request_s: float = PRIOR_S  #: one request, p90
    margin_s: float = LEAD_MARGIN_S

    @property
    def lead_s(self) -> float:
        """How long before the end of a generation its successor is ordered."""
        return self.wait_s + self.warmup_s + self.request_s + self.margin_s


def learn(
    past: Sequence[Allocation],
    *,
    deployment: str,
    site: str,
    request_s: float,
    waiting_s: Iterable[float] = (),
    priors: Priors | None = None,
) -> Times:
    """Expected times, from all allocations known (the oldest first).

    Args:
        past: ended and live ones, of any site and deployment.
        deployment: whose next generation is asked about.
        site: where it is to run.
        request_s: p90 of its requests.
        waiting_s: how long its pending allocations have waited until now.
        priors: what stands in for times that were not seen; None is a cautious guess.
    """
    priors = priors or Priors()
    here = [each for each in past if each.site == site]
    own = [each for each in here if each.deployment == deployment]
    waits = _waits(own)
    if len(waits) < _ENOUGH:
        others = [each for each in here if each.deployment != deployment]
        waits = [*_waits(others)[-(_ENOUGH - len(waits)) :], *waits]
    wait_s = _quantile(waits, 8, prior=priors.wait_s)
    longer = [each for each in waiting_s if each > wait_s]
    warmups = [
        each.warm_at - each.started_at
        for each in own
        if each.warm_at is not None and each.started_at is not None
    ]
    return Times(
        wait_s=max(longer, default=wait_s),
        warmup_s=_quantile(warmups, 9, prior=priors.warmup_s),
        request_s=request_s,
        margin_s=priors.margin_s,
    )


def _waits(allocations: Iterable[Allocation]) -> list[float]:
    return [
        max(0.0, each.started_at - each.submitted_at - each.begin_after_s)
        for each in allocations
        if each.started_at is not None
    ]


def _quantile(known: Sequence[float], tenths: int, *, prior: float) -> float:
    newest = [max(0.0, each) for each in known[-_KEPT:]]
    newest += [prior] * (_ENOUGH - len(newest))
    return quantiles(newest, n=10, method="inclusive")[tenths - 1]
