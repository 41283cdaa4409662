"""The relay's HTTP application, and the server that runs it inside the relay's one event loop.

`Edge` lies around all routes and holds what is true of every exchange: security headers, no traceback for a client, and
a refusal that arrives. The last is not free: a client that is told "too large" is still sending, and closing a socket
with unread bytes resets it, so the answer is lost. The edge therefore answers at once, reads on for a while, and
only then closes.

Connections stay open for days, so pings keep NATs open and TCP keepalive finds dead peers; a missing pong means
nothing (see `client_api`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edif_hpc.clock import Clock
from edif_hpc.errors import EdifError, SettingsError
from edif_hpc.objects.base import ObjectStore
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.objects.signing import Signer
from edif_hpc.relay import client_api, files, hub, hub_api, launcher_api, operator_api
from edif_hpc.relay.accounts import Accounts
from edif_hpc.relay.answers import Json, refusal
from edif_hpc.relay.hub_catalog import Catalog, Patterns
from edif_hpc.relay.hub_shelf import Shelf
from edif_hpc.relay.sessions import Sessions
from edif_hpc.settings import RelaySettings

_log = logging.getLogger(__name__)

LINGER_S = 30.0
_GRACE_S = 5
_KEEPALIVE_S = 60
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


class Broker(client_api.Broker, operator_api.Broker, files.Broker, Protocol):
    """All that the routes ask of the broker."""


class Fleet(client_api.Fleet, operator_api.Fleet, Protocol):
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
    client = client_api.ClientApi(
        broker=deps.broker,
        fleet=deps.fleet,
        accounts=deps.accounts,
        sessions=deps.sessions,
        blobs=deps.blobs,
        settings=deps.settings,
        clock=deps.clock,
    )
    operator = operator_api.OperatorApi(
        broker=deps.broker,
        fleet=deps.fleet,
        accounts=deps.accounts,
        sessions=deps.sessions,
        public_url=deps.settings.public_url,
    )
    links = files.Files(
        broker=deps.broker,
        objects=deps.objects,
        blobs=deps.blobs,
        signer=deps.signer,
        clock=deps.clock,
    )
    return Starlette(
        routes=[
            *client.routes(),
            *_hub_routes(deps),
            *(deps.launching.routes() if deps.launching is not None else ()),
            *operator.routes(),
            *links.routes(),
            *extra_routes,
        ],
        middleware=[Middleware(Edge, linger_s=deps.linger_s)],
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


class Edge:
    """The outermost layer; see the module's text."""

    def __init__(self, app: ASGIApp, *, linger_s: float) -> None:
        self._app, self._linger_s = app, linger_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._linger_s)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            _log.info("a client left early", extra={"event": "client_left", "path": scope["path"]})
        except Exception:
            report = secrets.token_hex(4)
            _log.exception(
                "unexpected error",
                extra={"event": "http_error", "report": report, "path": scope["path"]},
            )
            if exchange.started:
                raise  # the server cuts the connection: half an answer must not look whole
            detail = f"the relay failed; tell its operator about report {report}"
            answer = Json({"detail": detail, "code": "internal"}, status_code=500)
            await answer(scope, exchange.receive, exchange.send)


class _Exchange:
    """One request and its answer, as they pass the edge."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, linger_s: float) -> None:
        headers = Headers(scope=scope)
        self._receive, self._send, self._linger_s = receive, send, linger_s
        self._secure = scope["scheme"] == "https"
        self._unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        # Who waits for "100 Continue" has not begun to send, and asking to receive would invite them.
        self._waits = "expect" in headers
        self._lingers = False
        self.started = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._waits = False
        if message["type"] != "http.request" or not message.get("more_body", False):
            self._unread = False
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self._add_headers(message)
        elif self._lingers and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)

    def _add_headers(self, message: Message) -> None:
        message.setdefault("headers", [])
        headers = MutableHeaders(raw=message["headers"])
        for name, value in _HEADERS.items():
            headers.setdefault(name, value)
        if self._secure:
            headers.setdefault("strict-transport-security", "max-age=31536000")
        if self._unread:
            headers["connection"] = "close"
            self._lingers = not self._waits
        message["headers"] = headers.raw

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(self._linger_s):
                while self._unread:
                    await self.receive()
        except TimeoutError:
            _log.info("a refused client went on sending", extra={"event": "linger_ended"})


class Server(uvicorn.Server):
    """The HTTP server. It listens from its construction on; signals stay the caller's."""

    def __init__(self, app: Starlette, settings: RelaySettings) -> None:
        self._socket = _listen(settings.host, settings.port)
        self._scheme, self._host = ("https" if settings.tls else "http"), settings.host
        self.ready = asyncio.Event()
        config = uvicorn.Config(
            app,
            http="httptools",
            ws="websockets-sansio",
            ws_ping_interval=settings.ws_ping_interval_s,
            ws_ping_timeout=None,
            ws_max_size=64 << 10,  # clients say nothing
            ws_per_message_deflate=False,
            lifespan="off",
            server_header=False,
            access_log=False,
            log_config=None,
            proxy_headers=settings.behind_proxy,
            forwarded_allow_ips="*",
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        super().__init__(config)
        try:
            config.load()
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
        """Serve until `stop` is called."""
        await self.serve(sockets=[self._socket])

    def stop(self) -> None:
        """Finish what is under way, close the connections, and return from `run_until_stopped`."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept."""
        await super().startup(sockets)
        self.ready.set()

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
