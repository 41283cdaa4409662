"""How often each caller may ask: the layer between the edge and the routes.

A call that shows a valid token is charged to the token, any other to the address that it comes from; so people behind one
NAT, or on one login node, do not pay for each other. Requests, polls, connections for updates, signed links and all the rest
have rates of their own. Who is over one is held for a moment first, which smooths a burst without an error, and refused only
when that would take too long. Polls are only ever held: nnsight's client raises on a refusal, and its users poll in loops.

A wrong token is charged to the address, at a low rate of its own, and only calls with wrong tokens are refused for it: a
neighbour who guesses locks nobody out. (Guessing is hopeless, a secret has 256 bits; the rate keeps it from being a load.)

Behind a proxy, the address is the last one of `X-Forwarded-For`, the one that the proxy itself saw. All before it is
whatever the client sent.
"""

from __future__ import annotations

import asyncio
import math
from contextlib import ExitStack

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from edif_hpc.clock import Clock
from edif_hpc.domain.pacing import Rates, Shares, origin
from edif_hpc.domain.people import TOKEN_PREFIX
from edif_hpc.errors import NotAuthenticated, TooMany
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.relay.answers import refusal
from edif_hpc.settings import RelaySettings

_SCHEMES = frozenset({"http", "https"})
_LINKS = ("/results/", "/blobs/", "/objects/", "/uploads/")
_POLLS = "/response/"
_WHAT = {
    "request_rate": "requests",
    "poll_rate": "polls",
    "subscribe_rate": "connections for updates",
    "call_rate": "calls",
    "link_rate": "downloads and uploads by link",
    "failed_login_rate": "calls with a wrong API key",
}


class Gate:
    """The layer itself."""

    def __init__(
        self, app: ASGIApp, *, settings: RelaySettings, clock: Clock, accounts: Accounts
    ) -> None:
        self._app, self._clock, self._accounts = app, clock, accounts
        self._behind_proxy, self._patience_s = settings.behind_proxy, settings.patience_s
        self._rates = {name: Rates(rate=getattr(settings, name)) for name in _WHAT}
        self._open = Shares(limit=settings.max_connections_per_address)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one exchange through, now or a little later, or refuse it."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if self._behind_proxy:
            believe(scope)
        with ExitStack() as held:
            try:
                await self._admit(scope, held)
            except TooMany as error:
                await _refuse(error, scope, receive, send)
                return
            await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, held: ExitStack) -> None:
        source = origin(scope["client"][0]) if scope.get("client") else "local"
        if self._behind_proxy:  # without one, the door has counted already
            limit = self._open.limit
            text = f"{limit} calls from your address are under way (max_connections_per_address); end some first"
            held.enter_context(self._open.hold(source, text))
        token = self._token(scope)
        if token is None and self._wrong(scope):
            await self._pass("failed_login_rate", source, "your address")
        elif token is None or _is_link(scope):
            name = "link_rate" if _is_link(scope) else "call_rate"
            await self._pass(name, source, "your address")
        else:
            await self._pass(_rate_of(scope), token, "your token")

    async def _pass(self, name: str, key: str, whose: str) -> None:
        """Wait for a place, or raise."""
        rates = self._rates[name]
        may, wait_s = rates.take(key, self._clock.monotonic(), patience_s=self._patience_s)
        if may or name == "poll_rate":
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, self._patience_s))
            return
        raise TooMany(
            f"too many {_WHAT[name]} from {whose}: {rates.rate:g} a second on average are allowed ({name}). "
            f"Try again in {math.ceil(wait_s)} s with fewer at a time, or ask the relay's operator to raise {name}",
            retry_s=wait_s,
        )

    def _token(self, scope: Scope) -> str | None:
        try:
            return self._accounts.authenticate(credential(Headers(scope=scope))).id
        except NotAuthenticated:
            return None

    def _wrong(self, scope: Scope) -> bool:
        """Whether it shows something that looks like a token of ours. The Hub's clients send the Hub's tokens, too."""
        shown = credential(Headers(scope=scope)) or ""
        return shown.startswith(f"{TOKEN_PREFIX}_")


def believe(scope: Scope) -> None:
    """Take scheme and address from the proxy's headers."""
    headers = Headers(scope=scope)
    scheme = headers.get("x-forwarded-proto", "").strip()
    if scheme in _SCHEMES:
        sockets = scope["type"] == "websocket"
        scope["scheme"] = scheme.replace("http", "ws") if sockets else scheme
    last = ",".join(headers.getlist("x-forwarded-for")).rpartition(",")[2].strip()
    if last:
        scope["client"] = (_without_port(last), 0)


def _without_port(text: str) -> str:
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _is_link(scope: Scope) -> bool:
    path: str = scope["path"]
    return scope["type"] == "http" and path.startswith(_LINKS)


def _rate_of(scope: Scope) -> str:
    if scope["type"] == "websocket":
        return "subscribe_rate"
    if scope["path"] == "/request":
        return "request_rate"
    return "poll_rate" if scope["path"].startswith(_POLLS) else "call_rate"


async def _refuse(error: TooMany, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(refusal(error))
    else:
        await refusal(error)(scope, receive, send)
