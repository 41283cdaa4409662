"""How the relay answers over HTTP: JSON by msgspec, and one shape for every error.

An error is `{"detail": ..., "code": ...}` with the status of its class. `detail` is what nnsight shows its user; `code`
is what our own clients branch on.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from http import HTTPStatus
from typing import Any, TypeVar

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from edif_hpc.errors import EdifError, InvalidInput, TooLarge, TooMany

_log = logging.getLogger(__name__)

MAX_JSON_BYTES = 1 << 20
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
HSTS = "max-age=31536000"
VERSION_HEADER = "edif-version"

_T = TypeVar("_T")


class Json(Response):
    """Any value that msgspec can write: builtins, dataclasses, enums."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body."""
        return msgspec.json.encode(content)


def refusal(error: EdifError) -> Json:
    """The answer to a deliberate error. What only the operator may read of it goes to the log."""
    if error.told != str(error):
        _log.error("refused: %s", error, extra={"event": "refused", "code": error.code})
    headers = {}
    if isinstance(error, TooMany) and error.retry_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_s)))
    body = {"detail": error.told, "code": error.code}
    return Json(body, status_code=error.http_status, headers=headers)


def canned(error: EdifError, *, secure: bool) -> bytes:
    """The same as bytes, for a connection that has come to no route; it closes after them."""
    answer = refusal(error)
    headers = {**answer.headers, **SECURITY_HEADERS, "connection": "close"}
    if secure:
        headers["strict-transport-security"] = HSTS
    status = HTTPStatus(error.http_status)
    lines = [f"HTTP/1.1 {status.value} {status.phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + bytes(answer.body)


async def read_json(request: Request, kind: type[_T], *, limit: int = MAX_JSON_BYTES) -> _T:
    """The body of a request as a value of `kind`; raise `InvalidInput` with the field that is wrong."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise TooLarge(f"the body has more than {limit} bytes")
    try:
        return msgspec.json.decode(bytes(body), type=kind)
    except msgspec.DecodeError as error:
        raise InvalidInput(f"the body cannot be read: {error}") from error


def base_url(connection: HTTPConnection, public_url: str | None) -> str:
    """How this client reaches the relay: the operator's word, else the address that the client itself used."""
    if public_url is not None:
        return public_url
    scheme = {"ws": "http", "wss": "https"}.get(connection.url.scheme, connection.url.scheme)
    return f"{scheme}://{connection.url.netloc}"


def own_version() -> str:
    """The version of this relay; "unknown" where it runs from sources that are not installed."""
    try:
        return importlib.metadata.version("edif-hpc")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
