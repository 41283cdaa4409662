"""The relay's HTTP application, and the server that runs it inside the relay's one event loop.

Around all routes lie the edge (what is true of every answer) and the gate (how often who may ask); before them, the door and
its guards (what a connection may do). Connections stay open for days, so pings keep NATs open and TCP keepalive finds dead
peers; a missing pong means nothing (see `client_api`).
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from edif_hpc.clock import Clock
from edif_hpc.errors import EdifError, SettingsError
from edif_hpc.objects.base import ObjectStore
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.objects.signing import Signer
from edif_hpc.relay import (
    client_api,
    files,
    hub,
    hub_api,
    launcher_api,
    operator_api,
    surroundings,
)
from edif_hpc.relay.accounts import Accounts
from edif_hpc.relay.answers import Json, refusal
from edif_hpc.relay.door import Door
from edif_hpc.relay.edge import Edge
from edif_hpc.relay.gate import Gate
from edif_hpc.relay.guard import MAX_MESSAGE_BYTES, GuardedHttp, GuardedWebSocket, Terms, Visit
from edif_hpc.relay.hub_catalog import Catalog, Patterns
from edif_hpc.relay.hub_shelf import Shelf
from edif_hpc.relay.limiting import Lives, RequestLimits
from edif_hpc.relay.sessions import Sessions
from edif_hpc.settings import RelaySettings

LINGER_S = 30.0
_GRACE_S = 5
_KEEPALIVE_S = 60
_UNACKNOWLEDGED_MS = 900_000


class Broker(client_api.Broker, operator_api.Broker, files.Broker, Protocol):
    """All that the routes ask of the broker."""


class Fleet(client_api.Fleet, operator_api.Fleet, surroundings.Fleet, Lives, Protocol):
    """All that the routes ask of the fleet."""


@dataclass(frozen=True, kw_only=True)
class Deps:
    """What the application is made of."""

    settings: RelaySettings
    clock: Clock
    broker: Broker
    fleet: Fleet
    accounts: Accounts
    sessions: Sessions
    blobs: BlobFolder
    objects: ObjectStore
    signer: Signer
    launching: launcher_api.LauncherApi | None = None
    linger_s: float = LINGER_S  #: how long a refused client may go on sending


def build_app(deps: Deps, *, extra_routes: Sequence[BaseRoute] = ()) -> Starlette:
    """The application; `extra_routes` are pages that the caller composes with it."""
    limits = RequestLimits(settings=deps.settings, fleet=deps.fleet)
    client = client_api.ClientApi(
        broker=deps.broker,
        fleet=deps.fleet,
        accounts=deps.accounts,
        sessions=deps.sessions,
        blobs=deps.blobs,
        limits=limits,
        settings=deps.settings,
        clock=deps.clock,
    )
    operator = operator_api.OperatorApi(
        broker=deps.broker,
        fleet=deps.fleet,
        accounts=deps.accounts,
        sessions=deps.sessions,
        limits=limits,
        public_url=deps.settings.public_url,
    )
    links = files.Files(
        broker=deps.broker,
        objects=deps.objects,
        blobs=deps.blobs,
        signer=deps.signer,
        clock=deps.clock,
    )
    around = surroundings.Surroundings(fleet=deps.fleet, accounts=deps.accounts, limits=limits)
    return Starlette(
        routes=[
            *client.routes(),
            *_hub_routes(deps),
            *around.routes(),
            *(deps.launching.routes() if deps.launching is not None else ()),
            *operator.routes(),
            *links.routes(),
            *extra_routes,
        ],
        middleware=[
            Middleware(Edge, linger_s=deps.linger_s),
            Middleware(Gate, settings=deps.settings, clock=deps.clock, accounts=deps.accounts),
        ],
        exception_handlers={EdifError: _on_refusal, HTTPException: _on_http_exception},
    )


def _hub_routes(deps: Deps) -> list[BaseRoute]:
    """The hub, and the operator's side of it."""
    settings = deps.settings
    shelf = Shelf(settings.data_dir / "hub", max_bytes=settings.hub_max_bytes)
    weights = Patterns.parse(settings.hub_weights)
    catalog = Catalog(shelf=shelf, deployments=deps.fleet.deployments, weights=weights)
    elsewhere = None
    if settings.hub_upstream is not None:
        from edif_hpc.relay import hub_upstream  # noqa: PLC0415 - its HTTP client costs memory

        elsewhere = hub_upstream.Upstream(
            settings.hub_upstream,
            allow=Patterns.parse(settings.hub_allow),
            prefix=hub.PREFIX,
            public_url=settings.public_url,
        )
    accounts = deps.accounts if settings.hub_login else None
    shown = hub.Hub(catalog=catalog, elsewhere=elsewhere, accounts=accounts)
    api = hub_api.HubApi(shelf=shelf, catalog=catalog, accounts=deps.accounts)
    return [*shown.routes(), *api.routes()]


class Server(uvicorn.Server):
    """The HTTP server. It listens from its construction on; signals stay the caller's."""

    def __init__(self, app: Starlette, settings: RelaySettings) -> None:
        self._socket = _listen(settings.host, settings.port)
        self._scheme, self._host = ("https" if settings.tls else "http"), settings.host
        self.ready = asyncio.Event()
        config = uvicorn.Config(
            app,
            http=GuardedHttp,
            ws=GuardedWebSocket,
            ws_ping_interval=settings.ws_ping_interval_s,
            ws_ping_timeout=None,
            ws_max_size=MAX_MESSAGE_BYTES,  # clients say nothing
            ws_per_message_deflate=False,
            lifespan="off",
            server_header=False,
            access_log=False,
            log_config=None,
            log_level="error",  # it warns of each malformed request; the door counts them
            proxy_headers=False,  # the gate reads them
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        super().__init__(config)
        self._settings = settings
        self._accepting: asyncio.Task[None] | None = None
        try:
            config.load()
            self.door = Door(self._socket, settings, self._protocol, config.ssl)
        except OSError as error:  # also what ssl raises
            self._socket.close()
            raise SettingsError(
                f"TLS cannot start with {settings.tls_cert} and {settings.tls_key}: {error}"
            ) from error

    @property
    def port(self) -> int:
        """The port that it listens on."""
        port: int = self._socket.getsockname()[1]
        return port

    @property
    def url(self) -> str:
        """Its address on this machine."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{self._scheme}://{host}:{self.port}"

    async def run_until_stopped(self) -> None:
        """Serve until `stop` is called; raises what ended it otherwise."""
        await self.serve(sockets=[self._socket])
        if self._accepting is not None and not self._accepting.cancelled():
            self._accepting.result()

    def stop(self) -> None:
        """Finish what is under way, close the connections, and return from `run_until_stopped`."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - we have it
        """Begin to accept, by a door of our own instead of asyncio's server."""
        self.servers = []
        self._accepting = asyncio.create_task(self.door.run(), name="door")
        self._accepting.add_done_callback(lambda _: self.stop())
        self.started = True
        self.ready.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end what is under way."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait({self._accepting})
        await super().shutdown(sockets)

    def _protocol(self, visit: Visit, terms: Terms) -> asyncio.Protocol:
        return GuardedHttp(
            visit=visit,
            terms=terms,
            config=self.config,
            server_state=self.server_state,
            app_state={},
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the process that runs us."""
        yield


def serve(app: Starlette, settings: RelaySettings) -> Server:
    """A server for the application, listening already; the caller runs it as a task."""
    return Server(app, settings)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}; set host and port to an address of this "
            "machine that is free"
        ) from error
    # Accepted connections inherit these.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_S)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_S // 3)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # What a client does not take is dropped in the end, also after we have closed; a line that is away for minutes is not.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)
    return listener


async def _on_refusal(_: Request, error: Exception) -> Response:
    if not isinstance(error, EdifError):
        raise error
    return refusal(error)


async def _on_http_exception(_: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    body = {"detail": error.detail, "code": code}
    return Json(body, status_code=error.status_code, headers=error.headers)
