"""nnsight's protocol without nnsight: for volume, for faults, and for what its client never does.

The relay treats a request's blob as opaque bytes, so a test may send one that was captured from the real client, or one of
`noop_worker`. `RawClient` posts and polls; `RawSession` is the WebSocket of a blocking client. Both raise what the wire
gives them. The one patient method is `ended`: it polls on while the relay is away, as a user's own loop does.
"""

from __future__ import annotations

import io
import json
import pickle
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self

import httpx
from websockets.sync.client import ClientConnection, connect

from edif_hpc.testing.wait import wait_until

NNSIGHT_VERSION: Final = "0.8.1"
TERMINAL: Final = frozenset({"COMPLETED", "ERROR"})
_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
_PICKLES = 4  # magic number, protocol, machine, and then the object


@dataclass(frozen=True, kw_only=True)
class Told:
    """One response model, as a frame or as the answer to a poll."""

    id: str
    status: str
    description: str = ""
    data: Any = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether it is the request's end."""
        return self.status in TERMINAL

    @property
    def kind(self) -> str | None:
        """The kind of the failure, of an ERROR."""
        return (self.meta.get("error") or {}).get("kind")


def told(frame: str | bytes) -> Told:
    """Read a frame of either sort; a binary one is in torch's legacy layout."""
    if isinstance(frame, str):
        model = json.loads(frame)
    else:
        stream = io.BytesIO(frame)
        model = [pickle.load(stream) for _ in range(_PICKLES)][-1]  # noqa: S301 - our own relay wrote it
    fields = {key: model[key] for key in ("id", "status", "description", "data") if key in model}
    return Told(meta=model.get("meta") or {}, **fields)


@dataclass(frozen=True, kw_only=True)
class RawClient:
    """A client of one relay under one token."""

    url: str
    token: str
    model_key: str
    version: str = NNSIGHT_VERSION

    @property
    def headers(self) -> dict[str, str]:
        """What nnsight sends along."""
        return {
            "ndif-api-key": self.token,
            "nnsight-version": self.version,
            "python-version": "3.11.0",
        }

    def post(
        self, blob: bytes, *, session: str = "", compress: bool = False, **headers: str
    ) -> httpx.Response:
        """Send a request; any answer is returned."""
        envelope = {
            "model_key": self.model_key,
            "session_id": session,
            "compress": compress,
            "env": {},
        }
        return httpx.post(
            f"{self.url}/request",
            data={"data": json.dumps(envelope)},
            files={"blob": ("request", blob, "application/octet-stream")},
            headers=self.headers
            | {name.replace("_", "-"): value for name, value in headers.items()},
            timeout=_TIMEOUT,
        )

    def send(
        self, blob: bytes, *, session: str = "", compress: bool = False, **headers: str
    ) -> str:
        """Send a request that has to be accepted; returns its id."""
        answer = self.post(blob, session=session, compress=compress, **headers)
        if not answer.is_success:
            raise httpx.HTTPStatusError(
                f"{answer.status_code}: {answer.text}", request=answer.request, response=answer
            )
        return told(answer.text).id

    def poll(self, request_id: str) -> Told:
        """Ask for a request once."""
        answer = httpx.get(
            f"{self.url}/response/{request_id}", headers=self.headers, timeout=_TIMEOUT
        )
        answer.raise_for_status()
        return told(answer.text)

    def ended(self, request_id: str, timeout_s: float = 60.0) -> Told:
        """Poll until it has ended, whatever happens to the relay meanwhile."""

        def look() -> Told | None:
            try:
                now = self.poll(request_id)
            except httpx.TransportError:
                return None
            return now if now.ended else None

        end = wait_until(look, timeout_s, f"request {request_id} ends")
        if end is None:
            raise TimeoutError(request_id)
        return end

    def result(self, end: Told) -> bytes:
        """The bytes of a result, inline or behind its link."""
        if isinstance(end.data, bytes):
            return end.data
        answer = httpx.get(str(end.data), timeout=_TIMEOUT)
        answer.raise_for_status()
        return answer.content

    def subscribe(self) -> RawSession:
        """Open the WebSocket of a blocking client."""
        return RawSession(self)


class RawSession:
    """One open WebSocket; `id` is its session."""

    def __init__(self, client: RawClient) -> None:
        self._client = client
        self._exit = ExitStack()
        dial = connect(
            client.url.replace("http", "ws", 1) + "/subscribe",
            additional_headers={"ndif-api-key": client.token},
            max_size=None,
            compression=None,
            ping_interval=None,
            open_timeout=10,
        )
        self.socket: ClientConnection = self._exit.enter_context(dial)
        self.id: str = json.loads(self.socket.recv(timeout=10))["session_id"]

    def send(self, blob: bytes, *, compress: bool = False, **headers: str) -> str:
        """Send a request under this session; returns its id."""
        return self._client.send(blob, session=self.id, compress=compress, **headers)

    def next(self, timeout_s: float = 60.0) -> Told:
        """The next frame."""
        return told(self.socket.recv(timeout=timeout_s))

    def until(self, request_id: str, *statuses: str, timeout_s: float = 60.0) -> Told:
        """Read frames until one of the request has one of the statuses."""
        while True:
            frame = self.next(timeout_s)
            if frame.id == request_id and frame.status in statuses:
                return frame

    def ended(self, request_id: str, timeout_s: float = 60.0) -> Told:
        """Read frames until the request has ended."""
        return self.until(request_id, *TERMINAL, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._exit.close()
