"""Frames and messages: one message is one msgpack frame, decoded into a checked struct or refused.

A frame longer than its limit is refused before it is decoded. msgspec checks tag, types and
lengths; what passes is a value of `messages`, never a bare dictionary, and nothing on the wire can
name code. Unknown fields are ignored, so that a newer peer may add some; an unknown tag or a wrong
type is a `RemoteProtocolError`.

What is sent is read back first (about a microsecond). So a message that the other side would
refuse fails here, where the stack names its author, and not as the fault of a peer over there.
"""

from __future__ import annotations

from typing import TypeVar

import msgspec

from edif_hpc.errors import LocalProtocolError, RemoteProtocolError
from edif_hpc.wire.messages import FromPeer, FromRelay, Message

_T = TypeVar("_T")

MAX_PEER_FRAME_BYTES = 2 << 20
MAX_RELAY_FRAME_BYTES = 2 << 20

_encoder = msgspec.msgpack.Encoder()
_from_peer: msgspec.msgpack.Decoder[FromPeer] = msgspec.msgpack.Decoder(FromPeer)
_from_relay: msgspec.msgpack.Decoder[FromRelay] = msgspec.msgpack.Decoder(FromRelay)


def encode(message: Message) -> bytes:
    """One message as a frame; `LocalProtocolError` if the other side would refuse it."""
    frame = _encoder.encode(message)
    try:
        if isinstance(message, FromPeer):
            decode_from_peer(frame)
        else:
            decode_from_relay(frame)
    except RemoteProtocolError as error:
        raise LocalProtocolError(f"a {type(message).__name__} cannot be sent: {error}") from error
    return frame


def decode_from_peer(frame: bytes) -> FromPeer:
    """A frame that the relay received."""
    return _decode(_from_peer, frame, MAX_PEER_FRAME_BYTES)


def decode_from_relay(frame: bytes) -> FromRelay:
    """A frame that a peer received."""
    return _decode(_from_relay, frame, MAX_RELAY_FRAME_BYTES)


def _decode(decoder: msgspec.msgpack.Decoder[_T], frame: bytes, limit_bytes: int) -> _T:
    if len(frame) > limit_bytes:
        raise RemoteProtocolError(
            f"a frame of {len(frame)} bytes is over the limit of {limit_bytes}"
        )
    try:
        return decoder.decode(frame)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise RemoteProtocolError(
            f"a frame of {len(frame)} bytes is not a message: {str(error)[:500]}"
        ) from error
