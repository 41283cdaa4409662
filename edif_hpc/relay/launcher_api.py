"""What a launcher calls: fetch what to submit and cancel, report what came of it and what the scheduler shows.

HTTPS, not the ZeroMQ link of workers and pilots: a launcher has nothing to be pushed to. It may live for a second, from cron, on
a login node where daemons are killed; then one request and one answer is all it needs, by a token of the role `launcher`, which
can do nothing else. What it says is checked field by field; a listing that it could not get is `null`, never empty.

`GET /api/slots/{deployment}/{slot}` tells an operator why a slot is as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from edif_hpc.domain.people import Role, require
from edif_hpc.errors import InvalidInput
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import Json, read_json
from edif_hpc.relay.jobs import JobLine
from edif_hpc.relay.orders import Orders
from edif_hpc.relay.slots import Slots

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


class Unheard(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An allocation whose pilot could not speak to the relay, in its own words."""

    name: Word
    node: Word
    detail: Detail = ""


class Words(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the log of an allocation ends, whose job the scheduler does not show any more."""

    allocation: Word
    detail: Detail = ""


class Report(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a launcher did and saw. `jobs` is one full, successful listing, or null."""

    site: Word
    launcher: Word
    submitted: Annotated[list[Submitted], Meta(max_length=100)] = []
    refused: Annotated[list[Refused], Meta(max_length=100)] = []
    cancelled: Annotated[list[Word], Meta(max_length=1000)] = []
    unheard: Annotated[list[Unheard], Meta(max_length=100)] = []
    words: Annotated[list[Words], Meta(max_length=100)] = []
    jobs: Annotated[list[JobLine], Meta(max_length=MAX_LISTED)] | None = None
    detail: Detail = ""


class LauncherApi:
    """The routes of launchers."""

    def __init__(
        self,
        *,
        orders: Orders,
        slots: Slots,
        accounts: Accounts,
        addresses: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        self._orders, self._slots, self._accounts = orders, slots, accounts
        self._addresses = addresses

    def routes(self) -> list[BaseRoute]:
        """For the application; they come before the operator's, which end with everything below `/api`."""
        return [
            Route("/api/launcher/orders", self.fetch, methods=["POST"]),
            Route("/api/launcher/report", self.report, methods=["POST"]),
            Route("/api/launcher/addresses", self.tell_addresses),
            Route("/api/launchers", self.list_launchers),
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
            unheard=[(each.name, each.node, each.detail) for each in told.unheard],
            words=[(each.allocation, each.detail) for each in told.words],
            jobs=told.jobs,
            detail=told.detail,
        )
        return Json({})

    async def tell_addresses(self, http: HttpRequest) -> Response:
        """URLs of all that a compute node has to reach, for a forwarder."""
        self._may(http, Role.LAUNCHER, Role.OPERATOR)
        return Json({"urls": self._addresses()})

    async def list_launchers(self, http: HttpRequest) -> Response:
        """The launcher last heard of, for each site."""
        self._may(http, Role.OPERATOR)
        return Json({"launchers": self._orders.heard()})

    async def explain(self, http: HttpRequest) -> Response:
        """Why a slot is as it is, with its generations."""
        self._may(http, Role.OPERATOR)
        slot = http.path_params["slot"]
        if not (slot.isascii() and slot.isdecimal()):
            raise InvalidInput(f"the slot is {slot[:20]!r}; it must be a number from 0")
        return Json(self._slots.explain(http.path_params["deployment"], int(slot)))

    def _may(self, http: HttpRequest, *roles: Role) -> None:
        require(self._accounts.authenticate(credential(http.headers)), *roles)
