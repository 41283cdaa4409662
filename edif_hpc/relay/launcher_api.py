"""What a launcher calls: fetch what to submit and cancel, report what came of it and what the scheduler shows.

HTTPS, not the ZeroMQ link of workers and pilots: a launcher has nothing to be pushed to. It may live for a second, from cron, on
a login node where daemons are killed; then one request and one answer is all it needs, by a token of the role `launcher`, which
can do nothing else. What it says is checked field by field; a listing that it could not get is `null`, never empty.

`GET /api/slots/{deployment}/{slot}` tells an operator why a slot is as it is.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta, Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edif_hpc.domain.people import Role, require
from edif_hpc.errors import InvalidInput
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import Json, read_json
from edif_hpc.relay.jobs import JobLine

Word = Annotated[str, Meta(min_length=1, max_length=100)]
Detail = Annotated[str, Meta(max_length=8000)]
MAX_LISTED = 10_000


class Fetch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A launcher asks for orders."""

    site: Word
    launcher: Word
    limit: Annotated[int, Meta(ge=0, le=100)] = 4


class Submitted(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An order was submitted."""

    allocation: Word
    job_id: Word


class Refused(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The scheduler refused an order."""

    allocation: Word
    kind: Literal["retry", "config", "quota"]
    detail: Detail = ""


class Report(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launcher did and saw. `jobs` is one full, successful listing, or null."""

    site: Word
    launcher: Word
    submitted: Annotated[list[Submitted], Meta(max_length=100)] = []
    refused: Annotated[list[Refused], Meta(max_length=100)] = []
    cancelled: Annotated[list[Word], Meta(max_length=1000)] = []
    jobs: Annotated[list[JobLine], Meta(max_length=MAX_LISTED)] | None = None
    detail: Detail = ""


class Orders(Protocol):
    """What is needed of the orders."""

    async def fetch(self, site: str, launcher: str, limit: int) -> list[dict[str, Any]]:
        """What to cancel and to submit."""

    async def report(
        self,
        site: str,
        launcher: str,
        *,
        submitted: list[tuple[str, str]],
        refused: list[tuple[str, str, str]],
        cancelled: list[str],
        jobs: list[JobLine] | None,
        detail: str,
    ) -> None:
        """What came of it."""


class Slots(Protocol):
    """What is needed of the slots."""

    def explain(self, deployment: str, index: int) -> dict[str, Any]:
        """Why a slot is as it is."""


class LauncherApi:
    """The routes of launchers."""

    def __init__(self, *, orders: Orders, slots: Slots, accounts: Accounts) -> None:
        self._orders, self._slots, self._accounts = orders, slots, accounts

    def routes(self) -> list[BaseRoute]:
        """For the application; they come before the operator's, which end with everything below `/api`."""
        return [
            Route("/api/launcher/orders", self.fetch, methods=["POST"]),
            Route("/api/launcher/report", self.report, methods=["POST"]),
            Route("/api/slots/{deployment}/{slot}", self.explain),
        ]

    async def fetch(self, http: HttpRequest) -> Response:
        """Orders for a launcher, which holds them from now on."""
        self._may(http, Role.LAUNCHER, Role.OPERATOR)
        asked = await read_json(http, Fetch)
        return Json({"orders": await self._orders.fetch(asked.site, asked.launcher, asked.limit)})

    async def report(self, http: HttpRequest) -> Response:
        """What a launcher did and saw."""
        self._may(http, Role.LAUNCHER, Role.OPERATOR)
        told = await read_json(http, Report)
        await self._orders.report(
            told.site,
            told.launcher,
            submitted=[(each.allocation, each.job_id) for each in told.submitted],
            refused=[(each.allocation, each.kind, each.detail) for each in told.refused],
            cancelled=told.cancelled,
            jobs=told.jobs,
            detail=told.detail,
        )
        return Json({})

    async def explain(self, http: HttpRequest) -> Response:
        """Why a slot is as it is, with its generations."""
        self._may(http, Role.OPERATOR)
        slot = http.path_params["slot"]
        if not (slot.isascii() and slot.isdecimal()):
            raise InvalidInput(f"the slot is {slot[:20]!r}; it must be a number from 0")
        return Json(self._slots.explain(http.path_params["deployment"], int(slot)))

    def _may(self, http: HttpRequest, *roles: Role) -> None:
        require(self._accounts.authenticate(credential(http.headers)), *roles)
