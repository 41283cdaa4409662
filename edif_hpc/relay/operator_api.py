"""What the command line and the pages call, under `/api`: JSON in, JSON out.

Most of it needs an operator's token. A researcher's token sees and cancels that person's own requests. `POST /api/join`
is for pilots: its credential is the one-time join token of their allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route

from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.limits import SAYS_NOTHING, Allowed
from edif_hpc.domain.people import Role, Token, require
from edif_hpc.domain.request import Request, RequestState
from edif_hpc.errors import Conflict, InvalidInput, NotFound
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import Json, base_url, own_version, read_json
from edif_hpc.relay.limiting import RequestLimits, told_limits
from edif_hpc.relay.operator_schema import (
    Drain,
    Failed,
    Join,
    NewAllocations,
    NewDeployment,
    NewLimits,
    NewToken,
    Scale,
    Submitted,
    request_view,
    token_view,
)
from edif_hpc.relay.sessions import Sessions, Update

_MAX_LISTED = 1000
_MAX_JOIN_BYTES = 4 << 10  # whoever sends it has shown no token yet


class Broker(Protocol):
    """What is needed of the broker."""

    async def view(self, request_id: str, base_url: str) -> tuple[Request, Update]:
        """A request and what a poll shows of it."""

    async def cancel(self, request_id: str, *, by: str) -> Request:
        """End a request that has not ended."""

    async def list_requests(
        self, *, owner: str | None, states: Iterable[RequestState], limit: int
    ) -> list[Request]:
        """The newest first."""

    async def explain(self, request_id: str) -> dict[str, Any]:
        """Why a request is where it is."""


class Fleet(Protocol):
    """What is needed of the fleet."""

    def deployments(self) -> list[Deployment]:
        """All, by name."""

    def status(self) -> dict[str, Any]:
        """The entries of nnsight's `/status`."""

    def processes(self) -> list[dict[str, Any]]:
        """For `ps`."""

    async def add_deployment(self, deployment: Deployment) -> None:
        """Add one."""

    async def remove_deployment(self, name: str, *, force: bool) -> int:
        """Remove one; returns how many requests were ended."""

    async def scale(self, deployment: str, replicas: int) -> None:
        """Another number of replicas."""

    async def limit(self, deployment: str, change: Callable[[Allowed], Allowed]) -> Deployment:
        """Other limits for its requests."""

    async def allocate(
        self,
        deployment: str,
        *,
        site: str,
        slots: int | None,
        walltime_min: int | None,
        gpu: str | None,
        gpus: int | None,
    ) -> list[dict[str, Any]]:
        """New allocations with their join tokens."""

    async def submitted(self, allocation_id: str, *, job_id: str) -> None:
        """The scheduler took it."""

    async def failed(self, allocation_id: str, *, cause: str, detail: str) -> None:
        """It never started, or it ended."""

    async def join(
        self, join_token: str, *, worker_key: str, pilot_key: str, node: str
    ) -> dict[str, Any]:
        """Spend a join token."""

    async def drain(self, deployment: str | None, allocation: str | None) -> int:
        """Drain; returns how many allocations."""


class OperatorApi:
    """The routes under `/api`."""

    def __init__(
        self,
        *,
        broker: Broker,
        fleet: Fleet,
        accounts: Accounts,
        sessions: Sessions,
        limits: RequestLimits,
        public_url: str | None,
    ) -> None:
        self._broker, self._fleet, self._accounts = broker, fleet, accounts
        self._limits = limits
        self._sessions, self._public_url = sessions, public_url

    def routes(self) -> list[BaseRoute]:
        """For the application."""
        table = [
            ("GET", "/deployments", self.list_deployments),
            ("POST", "/deployments", self.add_deployment),
            ("DELETE", "/deployments/{name}", self.remove_deployment),
            ("POST", "/deployments/{name}/replicas", self.scale),
            ("POST", "/deployments/{name}/limits", self.limit_deployment),
            ("GET", "/tokens", self.list_tokens),
            ("POST", "/tokens", self.create_token),
            ("DELETE", "/tokens/{id}", self.revoke_token),
            ("POST", "/tokens/{id}/limits", self.limit_token),
            ("GET", "/limits", self.own_limits),
            ("GET", "/requests", self.list_requests),
            ("GET", "/requests/{id}", self.show_request),
            ("DELETE", "/requests/{id}", self.cancel_request),
            ("GET", "/requests/{id}/explain", self.explain_request),
            ("GET", "/requests/{id}/result", self.link_result),
            ("GET", "/ps", self.processes),
            ("GET", "/status", self.status),
            ("POST", "/allocations", self.allocate),
            ("POST", "/allocations/{id}/submitted", self.submitted),
            ("POST", "/allocations/{id}/failed", self.failed),
            ("POST", "/join", self.join),
            ("POST", "/drain", self.drain),
        ]
        return [
            Mount("/api", routes=[Route(path, act, methods=[verb]) for verb, path, act in table])
        ]

    # -- deployments --------------------------------------------------------------------------

    async def list_deployments(self, http: HttpRequest) -> Response:
        """All deployments."""
        self._operator(http)
        return Json({"deployments": self._fleet.deployments()})

    async def add_deployment(self, http: HttpRequest) -> Response:
        """Add a deployment."""
        self._operator(http)
        deployment = (await read_json(http, NewDeployment)).value()
        await self._fleet.add_deployment(deployment)
        return Json(deployment, status_code=201)

    async def remove_deployment(self, http: HttpRequest) -> Response:
        """Remove a deployment; `?force=true` ends the requests that wait for it."""
        self._operator(http)
        force = http.query_params.get("force", "false") in ("true", "1")
        ended = await self._fleet.remove_deployment(http.path_params["name"], force=force)
        return Json({"ended_requests": ended})

    async def scale(self, http: HttpRequest) -> Response:
        """Another number of replicas; what is too many drains."""
        self._operator(http)
        asked = await read_json(http, Scale)
        await self._fleet.scale(http.path_params["name"], asked.replicas)
        return Json({})

    async def limit_deployment(self, http: HttpRequest) -> Response:
        """Other limits for what a deployment is sent from now on."""
        self._operator(http)
        asked = await read_json(http, NewLimits)
        return Json(await self._fleet.limit(http.path_params["name"], asked.over))

    # -- tokens -------------------------------------------------------------------------------

    async def list_tokens(self, http: HttpRequest) -> Response:
        """All tokens, without their secrets."""
        self._operator(http)
        return Json({"tokens": [token_view(each) for each in self._accounts.tokens()]})

    async def create_token(self, http: HttpRequest) -> Response:
        """A new token; its text is in this answer and never again."""
        self._operator(http)
        asked = await read_json(http, NewToken)
        said = msgspec.structs.asdict(asked) | {"limits": asked.limits.over(SAYS_NOTHING)}
        token, text = await self._accounts.create(**said)
        return Json(token_view(token) | {"token": text}, status_code=201)

    async def revoke_token(self, http: HttpRequest) -> Response:
        """Revoke a token."""
        self._operator(http)
        return Json(token_view(await self._accounts.revoke(http.path_params["id"])))

    async def limit_token(self, http: HttpRequest) -> Response:
        """Other limits for what a token sends from now on."""
        self._operator(http)
        asked = await read_json(http, NewLimits)
        return Json(token_view(await self._accounts.limit(http.path_params["id"], asked.over)))

    async def own_limits(self, http: HttpRequest) -> Response:
        """What a request of the caller may use, for each deployment, and who says so."""
        token = self._anybody(http)
        return Json(
            {
                "deployments": {
                    each.name: {
                        "repo_id": each.repo_id,
                        "limits": told_limits(self._limits.of(token, each)),
                    }
                    for each in self._fleet.deployments()
                }
            }
        )

    # -- requests -----------------------------------------------------------------------------

    async def list_requests(self, http: HttpRequest) -> Response:
        """An operator sees all requests, a researcher their own. `?state=` may be repeated."""
        token = self._anybody(http)
        owner = http.query_params.get("owner") if token.role is Role.OPERATOR else token.id
        found = await self._broker.list_requests(
            owner=owner, states=_states(http), limit=_limit(http)
        )
        return Json({"requests": [request_view(each) for each in found]})

    async def show_request(self, http: HttpRequest) -> Response:
        """One request and what a poll shows of it."""
        request, update = await self._own(http)
        shown = {"shown": update.status, "description": update.description}
        return Json(request_view(request) | shown)

    async def cancel_request(self, http: HttpRequest) -> Response:
        """Cancel a request; one that has ended stays as it is."""
        token = self._anybody(http)
        request, _ = await self._own(http)
        by = "its owner" if request.owner == token.id else f"the operator {token.name}"
        return Json(request_view(await self._broker.cancel(request.id, by=by)))

    async def explain_request(self, http: HttpRequest) -> Response:
        """Why a request is where it is, and what each attempt did."""
        request, _ = await self._own(http)
        return Json(await self._broker.explain(request.id))

    async def link_result(self, http: HttpRequest) -> Response:
        """A link to the result's bytes, and how to read them."""
        request, update = await self._own(http)
        if not update.final:
            raise Conflict(f"request {request.id} is {update.status} and has no result yet")
        if not isinstance(update.data, str) or request.result is None:
            raise NotFound(f"request {request.id} has no result: {update.description}")
        size = request.result.size_bytes
        return Json({"url": update.data, "compress": request.compress, "size_bytes": size})

    # -- the fleet ----------------------------------------------------------------------------

    async def processes(self, http: HttpRequest) -> Response:
        """Slots, allocations and workers."""
        self._operator(http)
        return Json({"processes": self._fleet.processes()})

    async def status(self, http: HttpRequest) -> Response:
        """The relay at a glance."""
        self._operator(http)
        unfinished = (RequestState.QUEUED, RequestState.DISPATCHED, RequestState.RUNNING)
        found = await self._broker.list_requests(owner=None, states=unfinished, limit=_MAX_LISTED)
        counts = {state: sum(1 for each in found if each.state is state) for state in unfinished}
        return Json(
            {
                "version": own_version(),
                "deployments": self._fleet.status(),
                "requests": counts,
                "sessions": len(self._sessions),
            }
        )

    async def allocate(self, http: HttpRequest) -> Response:
        """New allocations for the free slots of a deployment, with their join tokens."""
        self._operator(http)
        asked = await read_json(http, NewAllocations)
        made = await self._fleet.allocate(**msgspec.structs.asdict(asked))
        return Json({"allocations": made}, status_code=201)

    async def submitted(self, http: HttpRequest) -> Response:
        """The scheduler took an allocation."""
        self._operator(http)
        told = await read_json(http, Submitted)
        await self._fleet.submitted(http.path_params["id"], job_id=told.job_id)
        return Json({})

    async def failed(self, http: HttpRequest) -> Response:
        """An allocation never started, or it ended."""
        self._operator(http)
        told = await read_json(http, Failed)
        await self._fleet.failed(http.path_params["id"], cause=told.cause, detail=told.detail)
        return Json({})

    async def join(self, http: HttpRequest) -> Response:
        """A pilot registers its keys and hears where to connect; the join token is the credential."""
        told = await read_json(http, Join, limit=_MAX_JOIN_BYTES)
        answer = await self._fleet.join(
            told.join_token,
            worker_key=told.worker_key,
            pilot_key=told.pilot_key,
            node=told.node,
        )
        return Json(answer)

    async def drain(self, http: HttpRequest) -> Response:
        """Drain one allocation, one deployment, or everything."""
        self._operator(http)
        asked = await read_json(http, Drain)
        drained = await self._fleet.drain(asked.deployment, asked.allocation)
        return Json({"allocations": drained})

    # -- who may ------------------------------------------------------------------------------

    def _anybody(self, http: HttpRequest) -> Token:
        return self._accounts.authenticate(credential(http.headers))

    def _operator(self, http: HttpRequest) -> Token:
        token = self._anybody(http)
        require(token, Role.OPERATOR)
        return token

    async def _own(self, http: HttpRequest) -> tuple[Request, Update]:
        """The request in the path, if the caller may see it; others' do not exist for a researcher."""
        token = self._anybody(http)
        request_id = http.path_params["id"]
        base = base_url(http, self._public_url)
        request, update = await self._broker.view(request_id, base)
        if token.role is not Role.OPERATOR and request.owner != token.id:
            raise NotFound(f"there is no request {request_id}")
        return request, update


def _states(http: HttpRequest) -> list[RequestState]:
    try:
        return [RequestState(each.upper()) for each in http.query_params.getlist("state")]
    except ValueError as error:
        valid = ", ".join(RequestState)
        raise InvalidInput(f"{error}; the states are: {valid}") from error


def _limit(http: HttpRequest) -> int:
    text = http.query_params.get("limit", "100")
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= _MAX_LISTED):
        raise InvalidInput(f"limit is {text[:20]!r}; it must be 1 to {_MAX_LISTED}")
    return int(text)
