"""What requests find where they run: Python and its packages, stores, adapters, the level of isolation and what it means.

nnsight's own `/env` has the packages of one worker, for its `compare()`. This is the whole of it, per deployment, for
`edif-hpc env`. It names folders of the site, so it is for those who have a token, of whatever role.

Workers of one deployment may differ while an image is being replaced, or where nodes differ. What runs newest speaks for
packages and stores; of levels the weakest is told, because a request may come there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edif_hpc.domain.deployment import ALLOWED_ATTENTION, Deployment
from edif_hpc.domain.levels import Level, told
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import Json
from edif_hpc.relay.limiting import RequestLimits, told_limits
from edif_hpc.relay.seats import Worker

#: What a worker says of itself that is passed on as it stands, and what stands for it while none is warm.
_FACTS: Final[Mapping[str, Any]] = {
    "commit": None,
    "device": None,
    "unverified": False,
    "attn_implementation": None,
    "python_version": "",
    "packages": {},
    "stores": [],
    "libraries": [],
}


class Fleet(Protocol):
    """What is needed of the fleet."""

    def deployments(self) -> list[Deployment]:
        """All, by name."""

    def surroundings(self) -> list[dict[str, Any]]:
        """What requests find, by deployment."""


class Surroundings:
    """The route `/api/env`."""

    def __init__(self, *, fleet: Fleet, accounts: Accounts, limits: RequestLimits) -> None:
        self._fleet, self._accounts, self._limits = fleet, accounts, limits

    def routes(self) -> list[BaseRoute]:
        """For the application; it comes before the rest of `/api`."""
        return [Route("/api/env", self.show, methods=["GET"])]

    async def show(self, http: HttpRequest) -> Response:
        """All deployments, with the limits that this token has there."""
        token = self._accounts.authenticate(credential(http.headers))
        limits = {
            each.name: {"limits": told_limits(self._limits.of(token, each))}
            for each in self._fleet.deployments()
        }
        found = self._fleet.surroundings()
        return Json({"deployments": [each | limits[each["name"]] for each in found]})


def surroundings(
    deployments: Iterable[Deployment], workers: Iterable[Worker]
) -> list[dict[str, Any]]:
    """One entry a deployment, in their order."""
    warm = [each for each in workers if each.serves and "packages" in each.facts]
    return [
        _entry(each, [one for one in warm if one.peer.deployment == each.name])
        for each in deployments
    ]


def _entry(deployment: Deployment, workers: Sequence[Worker]) -> dict[str, Any]:
    newest = max(workers, key=lambda each: each.heard_at).facts if workers else {}
    level = _weakest(workers)
    return {
        "name": deployment.name,
        "repo_id": deployment.repo_id,
        "revision": deployment.revision,
        "dtype": newest.get("dtype", deployment.dtype),
        "tasks": list(deployment.tasks),
        "adapters": [each.repo_id for each in deployment.adapters],
        "attention": sorted(ALLOWED_ATTENTION),
        "workers": len(workers),
        "isolation": None if level is None else str(level),
        "isolation_floor": deployment.isolation_floor,
        "rules": [] if level is None else told(level),
        **{name: newest.get(name, empty) for name, empty in _FACTS.items()},
    }


def _weakest(workers: Iterable[Worker]) -> Level | None:
    order = list(Level)
    names = [str(level) for level in order]
    said = [each.facts.get("isolation") for each in workers]
    # What is not known here is taken for the weakest.
    found = [names.index(each) if each in names else len(order) - 1 for each in said]
    return order[max(found)] if found else None
