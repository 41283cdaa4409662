"""What a request may use, put together when it is accepted: by the relay, its deployment, its token, and what it asks for.

Time is special twice. A request may ask for less or more of it (the header `edif-timeout-s`), and gets the relay's
`default_wall_s` if nobody says anything: neither it nor its deployment or token. And no run is longer than a worker lives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.limits import NAMES, RELAY, Allowed, Limits, agreed
from edif_hpc.domain.people import Token
from edif_hpc.errors import InvalidInput
from edif_hpc.settings import RelaySettings

HEADER = "edif-timeout-s"


class Lives(Protocol):
    """The part of the fleet that is needed here."""

    def longest_run_s(self, deployment: str) -> float:
        """The longest run that its workers live for."""


@dataclass(frozen=True, kw_only=True)
class RequestLimits:
    """Finds the limits of requests."""

    settings: RelaySettings
    fleet: Lives

    def of(self, token: Token, deployment: Deployment, asked: str | None = None) -> Limits:
        """What a request gets; raise `InvalidInput` if it `asked` for a time that it cannot have."""
        said = {
            f"the token {token.name}": token.limits,
            f"the deployment {deployment.name}": deployment.limits,
            RELAY: self.settings.limits,
            "the walltime of its workers": self._lifetime(deployment),
        }
        most = agreed(said)
        if asked is not None:
            return agreed(said | {f"the header {HEADER}": _asked(asked, most)})
        if token.limits.wall_s is None and deployment.limits.wall_s is None:
            default = Allowed(wall_s=self.settings.default_wall_s)
            return agreed(said | {"the relay's default": default})
        return most

    def largest_bytes(self, token: Token) -> int:
        """The largest body that may be read under a token, before it is known for which deployment it is."""
        most = agreed({"token": token.limits, RELAY: self.settings.limits})
        return most.request_bytes

    def _lifetime(self, deployment: Deployment) -> Allowed:
        lived_s = self.fleet.longest_run_s(deployment.name)
        return Allowed(wall_s=lived_s if math.isfinite(lived_s) else None)


def told_limits(limits: Limits) -> dict[str, dict[str, Any]]:
    """Each limit with its value and who set it, as JSON."""
    return {
        name: {"value": getattr(limits, name), "set_by": limits.sources.get(name)}
        for name in NAMES
    }


def _asked(text: str, most: Limits) -> Allowed:
    try:
        wall_s = float(text)
    except ValueError:
        wall_s = math.nan
    if not 0 < wall_s <= most.wall_s:
        raise InvalidInput(
            f"{HEADER} is {text[:40]!r}; it must be seconds above 0, and at most {most.wall_s:g} s, the limit set by "
            f"{most.sources['wall_s']}. Ask for less, or split the run"
        )
    return Allowed(wall_s=wall_s)
