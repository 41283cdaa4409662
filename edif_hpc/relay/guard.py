"""What a connection may do before and beside its requests: uvicorn's protocols, with bounds.

uvicorn leaves four things open that a stranger can hold a server by. A head may come byte by byte for ever, and be of any
size; a body may come in a trickle; an answer may never be taken; and a WebSocket may send pings that nobody asked for. Here a
head has a deadline and a size, a body and an answer have to move (`Flow`, `_Taking`), and a client's side of a WebSocket, which
has nothing to say but pongs, has a small allowance. Who breaks a bound of a head or a body is told so; the others are cut off.

A connection counts (`Visit`) from when it is accepted until its last protocol has lost it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

from edif_hpc.domain.pacing import Flow, Rates
from edif_hpc.errors import EdifError, InvalidInput, TooLarge, TooSlow
from edif_hpc.relay.answers import canned

MAX_HEAD_BYTES = 32 << 10
MAX_TARGET_BYTES = 4 << 10  # also fewer digits than Python refuses to read as a number
MAX_HEADERS = 100
MAX_MESSAGE_BYTES = 4 << 10
_SAYS_RATE = 400.0  # bytes per second of a WebSocket's client; pongs need less than one
_LOOKS = 4  # at a body, in the time that it may stall
_SOCKETS_STALL = (
    5  # a WebSocket may be left unread for longer: its client reads between its own work
)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The bounds of all connections. `tell` is told of each that broke one."""

    head_s: float
    stall_s: float
    slowest_rate: float
    tell: Callable[[str, str], None]


@dataclass(kw_only=True)
class Visit:
    """One accepted connection of `origin`; `leave` takes it off the count, once."""

    origin: str
    leaving: Callable[[str], None]
    left: bool = False

    def leave(self) -> None:
        """It is gone."""
        if not self.left:
            self.left = True
            self.leaving(self.origin)


class _Taking:
    """Whether a client takes what was sent to it: watched while the transport's buffer is full."""

    def __init__(self, visit: Visit, terms: Terms, *, stall_s: float) -> None:
        self._visit, self._terms, self._stall_s = visit, terms, stall_s
        self._timer: asyncio.TimerHandle | None = None

    def paused(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        """The buffer is full, and nothing is added to it from now on."""
        self.resumed()
        owed = transport.get_write_buffer_size()
        self._timer = loop.call_later(self._stall_s, self._look, loop, transport, owed)

    def resumed(self) -> None:
        """It was taken."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, owed: int
    ) -> None:
        taken = owed - transport.get_write_buffer_size()
        if taken < self._terms.slowest_rate * self._stall_s:
            self._terms.tell("unread", self._visit.origin)
            transport.abort()
        else:
            self.paused(loop, transport)


class GuardedHttp(HttpToolsProtocol):
    """An HTTP connection within bounds."""

    def __init__(self, *, visit: Visit, terms: Terms, **server: Any) -> None:
        super().__init__(**server)
        self._visit, self._terms = visit, terms
        self._taking = _Taking(visit, terms, stall_s=terms.stall_s)
        self.ws_protocol_class = functools.partial(  # type: ignore[assignment]
            GuardedWebSocket, visit=visit, terms=terms
        )
        self._in_head = True
        self._head_bytes = self._headers_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._body_bytes = 0
        self._refusal: EdifError | None = None

    # -- what the transport says ---------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is here; it has not said anything."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._unwatch()
        self._visit.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """It says something: a part of a head or of a body."""
        if not self._busy:
            self._await_head()  # also if these are the empty lines that a parser skips before a head
        if self._in_head:
            self._head_bytes += len(data)
        self._body_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(_large_head())
        elif self._body_due and self._body_timer is None:
            self._await_body()

    def pause_writing(self) -> None:
        """It does not read as fast as we write."""
        super().pause_writing()
        self._taking.paused(self.loop, self.transport)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._taking.resumed()

    # -- what the parser says ------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._head_bytes, self._headers_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        """A part of its target."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._fail(TooLarge(f"the address has more than {MAX_TARGET_BYTES} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        super().on_header(name, value)
        self._headers_bytes += len(name) + len(value)
        if len(self.headers) > MAX_HEADERS:
            self._fail(TooLarge(f"the request has more than {MAX_HEADERS} headers"))
        if self._headers_bytes > MAX_HEAD_BYTES:
            self._fail(_large_head())

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._head_timed()
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        """From here on it is a WebSocket; its protocol has a watch of its own."""
        self._unwatch()
        super().handle_websocket_upgrade()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words
        """The parser gave up."""
        self._refuse(self._refusal or InvalidInput("this cannot be read as an HTTP request"))

    # -- inside --------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        """Whether a request is being answered."""
        return not getattr(self.cycle, "response_complete", True)  # it is None before the first

    @property
    def _body_due(self) -> bool:
        """Whether the client has more to send of what it announced."""
        return self._busy and self.cycle.more_body

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._terms.head_s, self._head_late)

    def _head_late(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()  # it was told, and has not read that either
            return
        head_s = self._terms.head_s
        self._head_timer = self.loop.call_later(head_s, self._head_late)
        self._refuse(TooSlow(f"the head of the request did not come within {head_s:g} s (head_s)"))

    def _await_body(self) -> None:
        terms = self._terms
        flow = Flow(stall_s=terms.stall_s, slowest=terms.slowest_rate)
        self._body_bytes = 0
        self._look_again(flow)

    def _look_again(self, flow: Flow) -> None:
        step_s = self._terms.stall_s / _LOOKS
        self._body_timer = self.loop.call_later(step_s, self._look, flow, step_s)

    def _look(self, flow: Flow, waited_s: float) -> None:
        self._body_timer = None
        if not self._body_due or self.transport.is_closing():
            return
        moved, self._body_bytes = self._body_bytes, 0
        if self.flow.read_paused or flow.moves(waited_s, moved):  # we may be the slow ones
            self._look_again(flow)
        else:
            self._drop()

    def _drop(self) -> None:
        """Its body does not come: answer in the place of whoever waits for it."""
        terms = self._terms
        if self.cycle.response_started:
            terms.tell("slow body", self._visit.origin)
            self.transport.abort()
            return
        self.cycle.disconnected = True
        self.cycle.message_event.set()
        self._answer(
            TooSlow(
                f"the body stopped coming: at least {terms.slowest_rate:g} bytes per second (slowest_rate) are expected, "
                f"on average over {terms.stall_s:g} s (stall_s); send it again over a better line"
            )
        )

    def _fail(self, error: EdifError) -> None:
        """Stop the parser; it calls `send_400_response`."""
        self._refusal = error
        raise error

    def _refuse(self, error: EdifError) -> None:
        if (
            self._busy
        ):  # an answer to something else is on its way, and this one would be read as a part of it
            self._terms.tell(error.code, self._visit.origin)
            self.transport.abort()
        else:
            self._answer(error)

    def _answer(self, error: EdifError) -> None:
        self._terms.tell(error.code, self._visit.origin)
        if not self.transport.is_closing():
            self.transport.write(canned(error, secure=self.scheme == "https"))
            self.transport.close()

    def _unwatch(self) -> None:
        self._taking.resumed()
        self._head_timed()
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _head_timed(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket whose client has nothing to say."""

    def __init__(self, *, visit: Visit, terms: Terms, **server: Any) -> None:
        super().__init__(**server)
        self._visit, self._terms = visit, terms
        self._taking = _Taking(visit, terms, stall_s=_SOCKETS_STALL * terms.stall_s)
        self._says = Rates(rate=_SAYS_RATE)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._taking.resumed()
        self._visit.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The client says something."""
        if self.handshake_initiated:  # what comes before it is accepted is kept for later, too
            may, _ = self._says.take("", self.loop.time(), count=len(data))
            if not may:
                self._terms.tell("talkative socket", self._visit.origin)
                self.transport.abort()
                return
        super().data_received(data)

    def handle_connect(self, event: Request) -> None:
        """Its handshake; one that is not whole is refused in our words."""
        if self.conn.accept(event).status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            super().handle_connect(event)
            return
        self.handshake_complete = self.close_sent = True
        error = InvalidInput("this is no handshake of a WebSocket")
        self._terms.tell(error.code, self._visit.origin)
        self.transport.write(canned(error, secure=self.scheme == "wss"))
        self.transport.close()

    def pause_writing(self) -> None:
        """It does not read as fast as we write."""
        super().pause_writing()
        self._taking.paused(self.loop, self.transport)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._taking.resumed()


def _large_head() -> TooLarge:
    return TooLarge(f"the head of the request has more than {MAX_HEAD_BYTES} bytes")
