"""How the relay answers over HTTP: JSON by msgspec, and one shape for every error.

An error is `{"detail": ..., "code": ...}` with the status of its class. `detail` is what nnsight shows its user; `code`
is what our own clients branch on.
"""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any, TypeVar

import msgspec
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from edif_hpc.errors import EdifError, InvalidInput, TooLarge

_log = logging.getLogger(__name__)

MAX_JSON_BYTES = 1 << 20
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
    return Json({"detail": error.told, "code": error.code}, status_code=error.http_status)


async def read_json(request: Request, kind: type[_T]) -> _T:
    """The body of a request as a value of `kind`; raise `InvalidInput` with the field that is wrong."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_JSON_BYTES:
            raise TooLarge(f"the body has more than {MAX_JSON_BYTES} bytes")
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
