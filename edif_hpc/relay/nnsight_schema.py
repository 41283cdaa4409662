"""What nnsight 0.8 says and hears, as bytes.

A client sends an envelope (JSON) beside an opaque blob. It hears a *response model* for each thing that happens, as JSON
in a text frame; only a result that travels inside the frame needs a binary one, which nnsight reads with `torch.load`.
The relay has no torch, so `frame` writes torch's legacy layout itself: five pickles of plain values (magic number,
protocol, machine, the object, storage keys), which every torch reads. Nothing here is ever unpickled.

The layout of the blob changes between nnsight's minor versions, and one of our workers has one of them. So other
versions are turned away at the door with the command that helps.
"""

from __future__ import annotations

import io
import pickle
import re
from typing import Any

import msgspec

from edif_hpc.errors import InvalidInput, UnsupportedClient
from edif_hpc.relay.sessions import Update

SERVED = "0.8"
INSTALL = f'pip install "nnsight=={SERVED}.*"'
SOCKET_IO_REFUSAL = f"This relay serves nnsight {SERVED}, which no longer uses socket.io. Your nnsight is older; install: {INSTALL}"

_SERVED = re.compile(r"0\.8(?:[.a-z+-].*)?", re.ASCII)
_PROTOCOL = 4
_MACHINE = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
_HEAD = b"".join(
    pickle.dumps(each, protocol=_PROTOCOL) for each in (0x1950A86A20F9469CFC6C, 1001, _MACHINE)
)
_TAIL = pickle.dumps([], protocol=_PROTOCOL)


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON part of a request; fields that we do not know are ignored, as nnsight does."""

    model_key: str
    session_id: str = ""
    compress: bool = False
    env: dict[str, Any] = msgspec.field(default_factory=dict)


def parse_envelope(raw: bytes) -> Envelope:
    """Read the envelope; raise `InvalidInput` with the field that is wrong."""
    try:
        return msgspec.json.decode(raw, type=Envelope)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidInput(
            f"the request's envelope (form field `data`) cannot be read: {error}"
        ) from error


def check_version(told: str | None) -> str:
    """Return the client's nnsight version, or raise `UnsupportedClient` that says what to install."""
    version = (told or "").strip()
    if _SERVED.fullmatch(version):
        return version
    shown = (
        f"is {version[:40]!r}"
        if version
        else "did not tell its version (it runs from a source tree)"
    )
    raise UnsupportedClient(
        f"this relay serves nnsight {SERVED}; yours {shown}. Install it with: {INSTALL}"
    )


def frame(update: Update) -> str | bytes:
    """The WebSocket frame of an update: binary when it carries a result's bytes, else text."""
    return binary_frame(update) if isinstance(update.data, bytes) else text_frame(update)


def text_frame(update: Update) -> str:
    """An update as JSON."""
    if isinstance(update.data, bytes):
        raise TypeError("a result's bytes do not fit into JSON; send a binary frame or a URL")
    return msgspec.json.encode(_model(update)).decode()


def binary_frame(update: Update) -> bytes:
    """An update in torch's legacy layout. A large `data` is copied once, into the frame."""
    model = _model(update)
    buffer = io.BytesIO()
    buffer.write(_HEAD)
    pickle.dump(model, buffer, protocol=_PROTOCOL)
    buffer.write(_TAIL)
    return buffer.getvalue()


def _model(update: Update) -> dict[str, Any]:
    model: dict[str, Any] = {
        "id": update.request_id,
        "status": str(update.status),
        "description": update.description,
    }
    if update.meta is not None:
        # Builtins only: what is pickled here must load without any class of ours.
        model["meta"] = msgspec.to_builtins(dict(update.meta), str_keys=True)
    if update.data is not None:
        model["data"] = update.data
    return model
