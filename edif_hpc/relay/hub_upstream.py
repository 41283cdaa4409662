"""The real Hub behind ours, for names that an operator allows.

API calls are passed through. Bytes are not: a client is told what the Hub's own headers say of a file, and where it lies.
The headers must be on *our* answer, because huggingface_hub does not follow the redirect of a metadata call to another
host; it reads `ETag`, `X-Repo-Commit` and `X-Linked-Size` there and downloads from `Location`. So the Hub is asked first,
through the redirects that stay on it, up to the one that leaves for its storage. Storage by chunks (Xet) is left out of
these headers, so downloads are plain HTTP.

The caller's `Authorization` goes to the Hub's own address and nowhere else. Each call has a client of its own, so there
are no cookies that one caller could leave for the next.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urljoin

import httpx
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from edif_hpc.errors import NotFound, Unavailable
from edif_hpc.relay.answers import base_url
from edif_hpc.relay.hub_catalog import Patterns

MAX_ANSWER_BYTES = 32 << 20
_TIMEOUT_S = 8.0  # huggingface_hub waits 10 s for metadata
_MAX_HOPS = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(?:/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_OWN_TOKEN = "bearer edif_"  # noqa: S105 - how a token of a relay begins
_PASSED = ("content-type", "x-error-code", "x-error-message", "x-repo-commit", "x-xet-cas-url",
           "x-xet-access-token", "x-xet-token-expiration")  # fmt: skip


class Upstream:
    """The Hub at `url`; `prefix` is where ours is mounted."""

    def __init__(self, url: str, *, allow: Patterns, prefix: str, public_url: str | None) -> None:
        self._url, self._allow = url, allow
        self._prefix, self._public_url = prefix, public_url
        self._origin = httpx.URL(url)
        self._tls = httpx.create_ssl_context()

    def allows(self, name: str) -> bool:
        """Whether an operator listed this name."""
        return _NAME.fullmatch(name) is not None and self._allow.match(name)

    async def record(self, http: HttpRequest) -> Response:
        """Pass an API call through; links to the Hub's next page lead through us again."""
        status, headers, body = await self._ask("GET", self._target(http), http)
        answer = Response(body, status_code=status, headers=_some(headers))
        if "link" in headers:
            mine = base_url(http, self._public_url) + self._prefix
            answer.headers["link"] = headers["link"].replace(self._url, mine)
        return answer

    async def file(self, http: HttpRequest) -> Response:
        """What the Hub says of a file, and where its bytes are."""
        target = self._target(http)
        seen: dict[str, str] = {}
        for _ in range(_MAX_HOPS):
            status, headers, _body = await self._ask("HEAD", target, http)
            if status >= 400:
                return Response(status_code=status, headers=_some(headers))
            seen |= _metadata(headers, whole=status == 200)
            if "location" not in headers or status == 200:
                break
            target = urljoin(target, headers["location"])
            if not self._is_mine(target):
                break
        return Response(status_code=307, headers=seen | {"location": target})

    def _target(self, http: HttpRequest) -> str:
        """The address of the same thing at the Hub, spelled as the caller spelled it."""
        raw = http.scope["raw_path"].decode("ascii", "replace").partition("?")[0]
        path = raw[raw.index(self._prefix) + len(self._prefix) :]
        if any(part in {".", ".."} for part in re.split(r"[/\\]", unquote(path))):
            raise NotFound(f"the path {path[:200]!r} leads elsewhere")
        query = f"?{http.url.query}" if http.url.query else ""
        return f"{self._url}{path}{query}"

    def _is_mine(self, target: str) -> bool:
        url = httpx.URL(target)
        mine = self._origin
        return (url.scheme, url.host, url.port) == (mine.scheme, mine.host, mine.port)

    async def _ask(
        self, method: str, url: str, http: HttpRequest
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One call, without redirects; the body is limited."""
        headers = {"accept-encoding": "identity" if method == "HEAD" else "gzip", **_token(http)}
        body = bytearray()
        try:
            async with (
                httpx.AsyncClient(verify=self._tls, timeout=_TIMEOUT_S) as client,
                client.stream(method, url, headers=headers) as answer,
            ):
                async for chunk in answer.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise Unavailable(
                            f"{self._url} answered with more than {MAX_ANSWER_BYTES} bytes"
                        )
        except httpx.HTTPError as error:
            raise Unavailable(
                f"the hub behind this relay, {self._url}, does not answer ({type(error).__name__}); "
                "try again, or tell the relay's operator"
            ) from error
        return answer.status_code, answer.headers, bytes(body)


def _token(http: HttpRequest) -> dict[str, str]:
    """The caller's credential for the Hub, if it is one: a token of ours stays here."""
    told = http.headers.get("authorization", "")
    return {} if not told or told.lower().startswith(_OWN_TOKEN) else {"authorization": told}


def _some(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in _PASSED if name in headers}


def _metadata(headers: Mapping[str, str], *, whole: bool) -> dict[str, Any]:
    """The headers that a cache needs. A redirect's own length and tag are not the file's."""
    found = {
        "x-repo-commit": headers.get("x-repo-commit"),
        "x-linked-etag": headers.get("x-linked-etag") or (headers.get("etag")),
        "x-linked-size": headers.get("x-linked-size")
        or (headers.get("content-length") if whole else None),
    }
    found["etag"] = found["x-linked-etag"]
    return {name: value for name, value in found.items() if value is not None}
