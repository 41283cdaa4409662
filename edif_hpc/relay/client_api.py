"""What nnsight 0.8 calls: subscribe, request, response, status, env, whoami.

A blocking client opens `/subscribe`, is told its session, posts its request and then only listens. It answers pings
only while it listens, and it does not listen while it uploads; so a missing pong never closes its socket, and the
server never closes first except when it stops. A non-blocking client posts without a session and polls `/response`.
Loops that poll too fast are slowed, never refused, because nnsight raises on a refusal.

Clients older than 0.8 get an answer that they print: what to install.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from edif_hpc.clock import Clock
from edif_hpc.domain.deployment import Deployment, ModelKey, check_env, parse_model_key
from edif_hpc.domain.pacing import Shares
from edif_hpc.domain.people import Token
from edif_hpc.domain.request import NewRequest, Request, RequestState
from edif_hpc.errors import EdifError, NotAuthenticated, NotFound
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.relay import nnsight_schema as schema
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import VERSION_HEADER, Json, base_url, own_version, refusal
from edif_hpc.relay.intake import Intake
from edif_hpc.relay.limiting import HEADER, RequestLimits
from edif_hpc.relay.sessions import Session, Sessions, Update
from edif_hpc.relay.uploads import Upload, receive_upload, told_bytes, too_large
from edif_hpc.settings import RelaySettings

_REMEMBERED_POLLS = 10_000
_HOLD_STEPS = 5


class Broker(Protocol):
    """The use cases that a researcher's client needs."""

    async def accept(
        self, new: NewRequest, blob: bytes | Path, session: Session | None
    ) -> Request:
        """Commit a request."""

    def holdings(self, owner: str) -> tuple[int, int]:
        """How many requests of one owner have not ended, and their bytes."""

    async def view(self, request_id: str, base_url: str) -> tuple[Request, Update]:
        """A request and what a poll shows of it."""

    def session_closed(self, session: Session) -> None:
        """A client's socket is gone."""


class Fleet(Protocol):
    """What serves, as a researcher's client asks for it."""

    def find(self, key: ModelKey) -> Deployment:
        """The deployment that serves a model key."""

    def status(self) -> dict[str, Any]:
        """The entries of nnsight's `/status`."""

    def environment(self) -> dict[str, Any]:
        """The body of nnsight's `/env`."""


class ClientApi:
    """The routes of nnsight's protocol."""

    def __init__(
        self,
        *,
        broker: Broker,
        fleet: Fleet,
        accounts: Accounts,
        sessions: Sessions,
        blobs: BlobFolder,
        limits: RequestLimits,
        settings: RelaySettings,
        clock: Clock,
    ) -> None:
        self._broker, self._fleet, self._accounts = broker, fleet, accounts
        self._sessions, self._blobs = sessions, blobs
        self._limits, self._settings, self._clock = limits, settings, clock
        self._intake = Intake(settings, held=broker.holdings, folder=settings.data_dir)
        self._listening = Shares(limit=settings.max_sessions_per_token)
        self._too_many = (
            f"{settings.max_sessions_per_token} connections for updates are open under your token "
            "(max_sessions_per_token); run fewer traces at a time, or send them with blocking=False and poll"
        )
        self._polled: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()

    def routes(self) -> list[BaseRoute]:
        """For the application."""
        return [
            WebSocketRoute("/subscribe", self.subscribe),
            Route("/request", self.request, methods=["POST"]),
            Route("/response/{id}", self.response),
            Route("/status", self.status),
            Route("/env", self.environment),
            Route("/whoami", self.whoami),
            Route("/ping", self.ping),
            Route("/connected", _connected),
            Route("/ws/socket.io{rest:path}", _socket_io, methods=["GET", "POST"]),
            WebSocketRoute("/ws/socket.io{rest:path}", _socket_io_upgrade),
        ]

    async def subscribe(self, socket: WebSocket) -> None:
        """Tell a blocking client what happens to its requests, until it leaves."""
        try:
            token = self._accounts.authenticate(credential(socket.headers))
            with self._listening.hold(token.id, self._too_many):
                await self._listen(socket, token)
        except EdifError as error:
            await socket.send_denial_response(refusal(error))

    async def _listen(self, socket: WebSocket, token: Token) -> None:
        await socket.accept()
        session = self._sessions.open(token.id, base_url(socket, self._settings.public_url))
        try:
            with contextlib.suppress(WebSocketDisconnect):
                await socket.send_json({"session_id": session.id})
                await _converse(socket, session)
        finally:
            self._sessions.close(session)
            self._broker.session_closed(session)

    async def request(self, http: HttpRequest) -> Response:
        """Accept a request; it is durable when this answers."""
        token = self._accounts.authenticate(credential(http.headers))
        version = schema.check_version(http.headers.get("nnsight-version"))
        limit = self._limits.largest_bytes(token)
        told = told_bytes(http, limit)
        with self._intake.admit(token.id, told):
            async with receive_upload(
                http, folder=self._blobs, limit_bytes=limit, room=self._intake.check_room
            ) as upload:
                return await self._accept(http, token, version, upload)

    async def _accept(
        self, http: HttpRequest, token: Token, version: str, upload: Upload
    ) -> Response:
        self._intake.check_bytes(token.id, upload.blob_bytes)
        envelope = schema.parse_envelope(upload.envelope)
        session = (
            self._sessions.get(envelope.session_id, token.id) if envelope.session_id else None
        )
        new = self._new(http, token, version, envelope, upload)
        if upload.blob_bytes > new.limits.request_bytes:
            raise too_large(new.limits.request_bytes, upload.blob_bytes)
        accepted = await self._broker.accept(new, upload.blob, session)
        hint = f"accepted; if you lose the connection: edif-hpc request fetch {accepted.id}"
        update = Update(
            request_id=accepted.id, status=str(RequestState.RECEIVED), description=hint
        )
        return Response(schema.text_frame(update), media_type="application/json")

    async def response(self, http: HttpRequest) -> Response:
        """What a request is doing, or its result's link; for its owner only."""
        token = self._accounts.authenticate(credential(http.headers))
        request_id = http.path_params["id"]
        base = base_url(http, self._settings.public_url)
        key = (token.id, request_id)
        update = await self._view(token, request_id, base)
        for _ in range(_HOLD_STEPS):
            if update.final or (update.status, update.description) != self._polled.get(key):
                break  # there is news for this client
            await asyncio.sleep(self._settings.poll_hold_s / _HOLD_STEPS)
            update = await self._view(token, request_id, base)
        self._remember(key, (update.status, update.description))
        return Response(schema.text_frame(update), media_type="application/json")

    async def status(self, _: HttpRequest) -> Response:
        """What is served; open to all, as nnsight sends no token here."""
        return Json({"deployments": self._fleet.status()})

    async def environment(self, _: HttpRequest) -> Response:
        """Versions that run on the workers; open to all, as nnsight sends no token here."""
        return Json(self._fleet.environment())

    async def whoami(self, http: HttpRequest) -> Response:
        """Whose token this is."""
        token = self._accounts.authenticate(credential(http.headers))
        return Json({"email": token.name, "tags": [token.role]})

    async def ping(self, http: HttpRequest) -> Response:
        """That the relay is there; its version is for those alone who show a token."""
        try:
            self._accounts.authenticate(credential(http.headers))
        except NotAuthenticated:
            return PlainTextResponse("pong")
        return PlainTextResponse("pong", headers={VERSION_HEADER: own_version()})

    def _new(
        self,
        http: HttpRequest,
        token: Token,
        version: str,
        envelope: schema.Envelope,
        upload: Upload,
    ) -> NewRequest:
        deployment = self._fleet.find(parse_model_key(envelope.model_key))
        check_env(envelope.env, deployment.adapters)
        now = self._clock.wall()
        queue_s = self._settings.queue_s if token.queue_s is None else token.queue_s
        return NewRequest(
            id=secrets.token_hex(16),
            owner=token.id,
            deployment=deployment.name,
            model_key=envelope.model_key,
            compress=envelope.compress,
            env=envelope.env,
            blob_bytes=upload.blob_bytes,
            blob_sha256=upload.blob_sha256,
            limits=self._limits.of(token, deployment, http.headers.get(HEADER)),
            accepted_at=now,
            expires_at=now + queue_s,
            keep=token.keep,
            client={
                "nnsight": version[:40],
                "python": http.headers.get("python-version", "").partition(" ")[0][:40],
            },
        )

    async def _view(self, token: Token, request_id: str, base: str) -> Update:
        request, update = await self._broker.view(request_id, base)
        if request.owner != token.id:
            raise NotFound(f"there is no request {request_id}")
        return update

    def _remember(self, key: tuple[str, str], told: tuple[str, str]) -> None:
        self._polled[key] = told
        self._polled.move_to_end(key)
        while len(self._polled) > _REMEMBERED_POLLS:
            self._polled.popitem(last=False)


async def _converse(socket: WebSocket, session: Session) -> None:
    """Send updates until the client closes. It never says anything; reading is how its leaving is noticed."""
    sender = asyncio.create_task(_send_updates(socket, session), name=f"session {session.id[:6]}")
    session.on_overflow = sender.cancel
    reader = asyncio.create_task(_read_close(socket), name=f"close of {session.id[:6]}")
    try:
        await asyncio.wait({sender, reader}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        reader.cancel()
        sender.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await sender


async def _send_updates(socket: WebSocket, session: Session) -> None:
    while True:
        content = schema.frame(await session.next())
        if isinstance(content, bytes):
            await socket.send_bytes(content)
        else:
            await socket.send_text(content)


async def _read_close(socket: WebSocket) -> None:
    while (await socket.receive())["type"] != "websocket.disconnect":
        pass


async def _connected(_: HttpRequest) -> Response:
    return Json({"status": "connected"})


async def _socket_io(_: HttpRequest) -> Response:
    return PlainTextResponse(schema.SOCKET_IO_REFUSAL, status_code=400)


async def _socket_io_upgrade(socket: WebSocket) -> None:
    await socket.send_denial_response(PlainTextResponse(schema.SOCKET_IO_REFUSAL, status_code=400))
