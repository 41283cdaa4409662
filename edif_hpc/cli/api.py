"""The relay's operator API, as the command line calls it.

An answer that is an error comes back as the class that the relay raised, found by its wire code, with the relay's own
words. A relay that cannot be reached is `Unreachable`, and the message says what to look at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from edif_hpc import errors
from edif_hpc.errors import EdifError, SettingsError, Unavailable
from edif_hpc.settings import ClientSettings, is_loopback

TIMEOUT_S = 30.0
UPLOAD_TIMEOUT_S = 600.0


class Unreachable(Unavailable):
    """No relay answered at this address."""

    code = "unreachable"


class Api:
    """One relay."""

    def __init__(self, settings: ClientSettings, *, timeout_s: float = TIMEOUT_S) -> None:
        self.url = settings.relay
        self._token = settings.token
        # Proxies of the environment are for the world outside, not for a tunnel's end on this machine.
        local = is_loopback(httpx.URL(self.url).host)
        self._http = httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=not local)

    def get(self, path: str, **params: Any) -> Any:
        """The JSON of a GET."""
        return self._call("GET", path, params=params).json()

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of a POST."""
        return self._call("POST", path, json=body).json()

    def put_file(self, path: str, file: Path) -> None:
        """PUT a file's bytes; the relay answers when they are on its disk."""
        with file.open("rb") as content:
            self._call("PUT", path, content=content, timeout=UPLOAD_TIMEOUT_S)

    def delete(self, path: str, **params: Any) -> Any:
        """The JSON of a DELETE."""
        return self._call("DELETE", path, params=params).json()

    def open(self, path: str, *, signed: bool = False) -> httpx.Response:
        """A GET of what needs no token; `signed` shows it if there is one, which may bring more."""
        shown = signed and self._token is not None
        headers = {"authorization": f"Bearer {self._token}"} if shown else {}
        return self._send("GET", path, headers)

    def _call(self, method: str, path: str, **more: Any) -> httpx.Response:
        if self._token is None:
            raise SettingsError(
                f"no token for the relay at {self.url}; set EDIF_TOKEN, or token under [client] in the settings file"
            )
        return self._send(method, path, {"authorization": f"Bearer {self._token}"}, **more)

    def _send(
        self, method: str, path: str, headers: dict[str, str], **more: Any
    ) -> httpx.Response:
        try:
            response = self._http.request(method, path, headers=headers, **more)
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error
        check(response)
        return response


def unreachable(url: str, error: httpx.HTTPError) -> Unreachable:
    """What to say of a connection that failed."""
    seen = str(error) or type(error).__name__
    return Unreachable(
        f"the relay at {url} does not answer ({seen}); is it running (edif-hpc relay serve), and is the address right "
        "(--relay, EDIF_RELAY)?"
    )


def check(response: httpx.Response) -> None:
    """Raise what the relay raised; `Unavailable` for an answer that is not a relay's."""
    if response.is_success:
        return
    try:
        body = response.json()
        code, detail = str(body["code"]), str(body["detail"])
    except (ValueError, TypeError, KeyError):
        seen = f"HTTP {response.status_code}: {response.text[:200]!r}"
        raise Unavailable(
            f"{response.url.copy_with(query=None)} did not answer like a relay ({seen}); check the address, and what "
            "stands between"
        ) from None
    kinds = {each.code: each for each in _classes(EdifError)}
    raise kinds.get(code, errors.Unavailable if response.is_server_error else errors.InvalidInput)(
        detail
    )


def part(text: str) -> str:
    """A word of the user as one part of a path."""
    return quote(text, safe="")


def _classes(root: type[EdifError]) -> Iterator[type[EdifError]]:
    yield root
    for each in root.__subclasses__():
        yield from _classes(each)
