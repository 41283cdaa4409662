"""The outermost layer: what is true of every exchange.

Security headers, no traceback for a client, and a refusal that arrives. The last is not free: a client that is told "too
large" is still sending, and closing a socket with unread bytes resets it, so the answer is lost. The edge therefore
answers at once, reads on for a while, and only then closes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edif_hpc.errors import NotFound
from edif_hpc.relay.answers import HSTS, SECURITY_HEADERS, Json, refusal

_log = logging.getLogger(__name__)


class Edge:
    """The layer itself."""

    def __init__(self, app: ASGIApp, *, linger_s: float) -> None:
        self._app, self._linger_s = app, linger_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Carry one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, _with_headers(scope, send))
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
        self._scope = scope
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
        headers = _add_headers(message, secure=self._scope["scheme"] == "https")
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


def _add_headers(message: Message, *, secure: bool) -> MutableHeaders:
    message.setdefault("headers", [])
    headers = MutableHeaders(raw=message["headers"])
    for name, value in SECURITY_HEADERS.items():
        headers.setdefault(name, value)
    if secure:
        headers.setdefault("strict-transport-security", HSTS)
    message["headers"] = headers.raw
    return headers


def _with_headers(scope: Scope, send: Send) -> Send:
    """The same for what answers a WebSocket's handshake. One that is closed before it began has no route."""
    begun = False

    async def sending(message: Message) -> None:
        nonlocal begun
        if message["type"] == "websocket.close" and not begun:
            nowhere = refusal(NotFound("there is nothing here to connect to"))
            await nowhere(scope, _nothing, sending)
            return
        if message["type"] in ("websocket.accept", "websocket.http.response.start"):
            begun = True
            _add_headers(message, secure=scope["scheme"] == "wss")
        await send(message)

    return sending


async def _nothing() -> Message:
    return {"type": "websocket.disconnect"}
