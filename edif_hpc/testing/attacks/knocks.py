"""Attempts on the relay by somebody with a researcher's token and no manners: raw bytes over HTTP, as data.

Each is one message, with the answers that refuse it. `{names}` stand for what the attacker knows: an own token and the signed link of an own result,
and the ids of another's request, result and session. The message goes out as it stands, because a client library would mend or refuse it.
"""

from __future__ import annotations

import json
import pickle
import re
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final
from urllib.parse import urlsplit

import zstandard

#: What no answer and no log may hold as it was sent.
INJECTED: Final = "\x1b[31mFORGED"
_BOUNDARY: Final = "edif-knock"
_NO_HEADERS: Final[Mapping[str, str]] = MappingProxyType({})
_TIMEOUT_S: Final = 60.0
_LENGTH: Final = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Knock:
    """One attempt, and the status codes that refuse it; 0 is a connection that was closed without an answer."""

    name: str
    line: str
    refused: frozenset[int]
    headers: Mapping[str, str]
    body: Callable[[Mapping[str, str]], bytes]


def knock(
    name: str,
    line: str,
    *refused: int,
    headers: Mapping[str, str] = _NO_HEADERS,
    body: Callable[[Mapping[str, str]], bytes] = lambda _: b"",
) -> Knock:
    """One row."""
    return Knock(name=name, line=line, refused=frozenset(refused), headers=headers, body=body)


def send(url: str, attempt: Knock, known: Mapping[str, str]) -> tuple[int, bytes]:
    """Make an attempt; the status of the answer, and all of it."""
    place = urlsplit(url)
    content = attempt.body(known)
    headers = {
        "host": place.netloc,
        "connection": "close",
        "ndif-api-key": known["token"],
        "nnsight-version": "0.8.1",
        "content-type": f"multipart/form-data; boundary={_BOUNDARY}",
        "content-length": str(len(content)),
    } | {name: value.format_map(known) for name, value in attempt.headers.items()}
    head = f"{attempt.line.format_map(known)} HTTP/1.1\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    with socket.create_connection((place.hostname, place.port), timeout=_TIMEOUT_S) as raw:
        with suppress(ConnectionError):
            raw.sendall(f"{head}\r\n".encode("latin-1") + content)
        answer = _answer(raw)
    first = answer.partition(b"\r\n")[0].split()
    return (int(first[1]) if len(first) > 1 else 0), answer


def _answer(raw: socket.socket) -> bytes:
    """One answer, or as much of it as comes before the connection is closed."""
    received = b""
    with suppress(ConnectionError):
        while not _whole(received) and (chunk := raw.recv(65536)):
            received += chunk
    return received


def _whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    size = _LENGTH.search(head)
    return bool(end) and size is not None and len(body) >= int(size[1])


def _request(**envelope: object) -> Callable[[Mapping[str, str]], bytes]:
    """A request's body with this envelope; texts in it are filled in."""

    def made(known: Mapping[str, str]) -> bytes:
        fields = {
            name: value.format_map(known) if isinstance(value, str) and "{" in value else value
            for name, value in {
                "model_key": None,
                "session_id": "",
                "compress": False,
                "env": {},
                **envelope,
            }.items()
        }
        fields["model_key"] = fields["model_key"] or known["model_key"]
        return _form(json.dumps(fields).encode())

    return made


def _form(data: bytes, blob: bytes = b"x", name: str = "data") -> bytes:
    parts = [(name, data, ""), ("blob", blob, '; filename="request"')]
    body = b"".join(
        f'--{_BOUNDARY}\r\ncontent-disposition: form-data; name="{each}"{more}\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for each, content, more in parts
    )
    return body + f"--{_BOUNDARY}--\r\n".encode()


_DEEP: Final = b'{"model_key": "x", "env": {"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}}"
_NOT_THERE: Final = (400, 403, 404)

OF_OTHERS: Final = (
    knock("poll another's request", "GET /response/{victim}", 404),
    knock("fetch another's request", "GET /api/requests/{victim}", 404),
    knock("cancel another's request", "DELETE /api/requests/{victim}", 404),
    knock("another's result without a signature", "GET /results/{victim}", 403),
    knock("another's result by a signature of one's own", "GET /results/{victim}?{query}", 403),
    knock("another's blob by a signature of one's own", "GET /blobs/{victim}?{query}", 403),
    knock(
        "listen to another's session",
        "POST /request",
        *_NOT_THERE,
        body=_request(session_id="{session}"),
    ),
    knock("an operator's list of tokens", "GET /api/tokens", 403),
    knock(
        "a token of one's own making",
        "POST /api/tokens",
        403,
        headers={"content-type": "application/json"},
    ),
    knock(
        "drain the workers", "POST /api/drain", 403, headers={"content-type": "application/json"}
    ),
    knock("remove a deployment", "DELETE /api/deployments/full", 403),
    knock("publish a model", "POST /api/hub", 403, headers={"content-type": "application/json"}),
)

LINKS: Final = (
    knock(
        "a signature that is wrong", "GET /results/{own}?expires={expires}&sig=" + "0" * 64, 403
    ),
    knock("a later end of a link", "GET /results/{own}?expires=9999999999&sig={sig}", 403),
    knock("an end that is no number", "GET /results/{own}?expires=NaN&sig={sig}", 403),
    knock(
        "a link that is signed twice",
        "GET /results/{own}?expires=9999999999&sig={sig}&expires={expires}&sig=x",
        403,
    ),
    knock("write by a link to read", "PUT /results/{own}?{query}", 403, 405),
    knock("delete by a link to read", "DELETE /results/{own}?{query}", 403, 405),
    knock("upload by a link to read", "PUT /uploads/{own}/1?{query}", 403),
    knock("an object by a link to a result", "GET /objects/{own}/1?{query}", 403),
)

PATHS: Final = (
    *(
        knock(f"a path out of the {where}: {path}", f"GET {prefix}{path}", *_NOT_THERE)
        for where, prefix in (
            ("objects", "/objects/"),
            ("blobs", "/blobs/"),
            ("hub", "/hub/edif/full/resolve/main/"),
        )
        for path in (
            "../../relay.db",
            "..%2f..%2frelay.db",
            "%2e%2e/%2e%2e/etc/passwd",
            "//etc/passwd",
            "a%00b",
            "%c0%ae%c0%ae/x",
        )
    ),
)

BENT: Final = (
    knock("a header in a path", "GET /response/x%0d%0aset-cookie:%20forged=1", 404),
    knock(
        "a header in a version",
        "POST /request",
        400,
        headers={"nnsight-version": "0.8.1\rset-cookie: forged=1"},
    ),
    knock(
        "a terminal's codes in a version",
        "POST /request",
        400,
        headers={"nnsight-version": INJECTED},
    ),
    knock("a terminal's codes in a path", "GET /response/%1b%5b31mFORGED", 404),
    knock(
        "a line of the log in a model's name",
        "POST /request",
        *_NOT_THERE,
        body=_request(model_key=f"x\n{INJECTED}\n2026 ERROR"),
    ),
    knock(
        "a line of the log in an environment",
        "POST /request",
        *_NOT_THERE,
        body=_request(env={f"x\n{INJECTED}": 1}),
    ),
    knock(
        "a line of the log in a session",
        "POST /request",
        *_NOT_THERE,
        body=_request(session_id=f"x\n{INJECTED}"),
    ),
    knock("an envelope that is too deep", "POST /request", 400, body=lambda _: _form(_DEEP)),
    knock(
        "an envelope that is too large",
        "POST /request",
        413,
        body=lambda _: _form(b"{" + b" " * (1 << 20)),
    ),
    knock(
        "a session's name that is too long",
        "POST /request",
        *_NOT_THERE,
        413,
        body=_request(session_id="s" * 60_000),
    ),
    knock(
        "a model's name that is too long",
        "POST /request",
        *_NOT_THERE,
        413,
        body=_request(model_key="m" * 60_000),
    ),
    knock(
        "an environment that is not allowed",
        "POST /request",
        *_NOT_THERE,
        body=_request(env={"attn_implementation": "x/y"}),
    ),
    knock(
        "an environment of the wrong type",
        "POST /request",
        *_NOT_THERE,
        body=_request(env={"attn_implementation": ["eager"], "peft": {}}),
    ),
    knock(
        "a model's name that is deep",
        "POST /request",
        *_NOT_THERE,
        body=_request(model_key="nnsight.modeling.transformers.TransformersModel:" + "[" * 25_000),
    ),
    knock(
        "a class that is not served",
        "POST /request",
        *_NOT_THERE,
        body=_request(model_key='os.system:{{"repo_id": "id"}}'),
    ),
    knock(
        "a part that is not wanted", "POST /request", 400, body=lambda _: _form(b"{}", name="more")
    ),
    knock("parts without an end", "POST /request", 400, 413, body=lambda _: _form(b"{}") * 10_000),
    knock("a body that is no form", "POST /request", 400, body=lambda _: b"\x00" * 4096),
    knock(
        "a length beyond all disks",
        "POST /request",
        0,
        400,
        413,
        headers={"content-length": "9" * 18},
    ),
    knock("a length below nothing", "POST /request", 0, 400, headers={"content-length": "-1"}),
    knock(
        "two ways to tell a length",
        "POST /request",
        0,
        400,
        headers={"transfer-encoding": "chunked"},
        body=lambda _: b"0\r\n\r\n",
    ),
    knock("a path that is too long", "GET /" + "a" * 100_000, 0, 400, 404, 413, 414, 431),
    knock(
        "a header that is too long",
        "GET /whoami",
        0,
        400,
        413,
        431,
        headers={"x-more": "a" * 200_000},
    ),
    knock(
        "a token that is too long",
        "GET /whoami",
        0,
        400,
        401,
        431,
        headers={"ndif-api-key": "t" * 16_000},
    ),
    knock(
        "too many headers",
        "GET /whoami",
        0,
        400,
        413,
        431,
        headers={f"x-{number}": "1" for number in range(5000)},
    ),
)

KNOCKS: Final = (*OF_OTHERS, *LINKS, *PATHS, *BENT)


def _zeros(size: int) -> bytes:
    """A frame that grows to so many zeros."""
    frame = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    piece = bytes(1 << 20)
    return b"".join([*(frame.compress(piece) for _ in range(size >> 20)), frame.flush()])


def _laughs() -> bytes:
    """A pickle in which each list has the one before it ten times over, without sharing once it is copied."""
    value: object = "ha"
    for _ in range(30):
        value = [value] * 10
    return zstandard.compress(pickle.dumps(value))


#: Blobs of requests, compressed as they say, and the kinds of ERROR that they may end in.
BLOBS: Final[Mapping[str, tuple[Callable[[], bytes], frozenset[str]]]] = MappingProxyType(
    {
        "a frame that grows without bounds": (lambda: _zeros(2 << 30), frozenset({"oom", "user"})),
        "a frame that does not say how large it is": (
            lambda: zstandard.ZstdCompressor().compressobj().compress(b"x") + b"\x00",
            frozenset({"user"}),
        ),
        "a pickle that is deep": (
            lambda: zstandard.compress(b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b"."),
            frozenset({"user", "crash", "oom"}),
        ),
        "a pickle that laughs": (_laughs, frozenset({"user"})),
        "a pickle of another thing": (
            lambda: zstandard.compress(b"\x80\x04cos\nsystem\n(Vexit 3\ntR."),
            frozenset({"user"}),
        ),
        "no frame at all": (lambda: b"\xff" * 1000, frozenset({"user"})),
    }
)
