"""The relay's operator API, as a test or a bench calls it: anything but success is an exception."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx


class Unexpected(AssertionError):
    """The relay's API answered something else than success."""


@dataclass(kw_only=True)
class Operator:
    """The relay's operator API."""

    url: str
    token: str

    def call(self, verb: str, path: str, body: Any = None) -> Any:
        """One call; `Unexpected` unless it succeeds."""
        headers = {"ndif-api-key": self.token}
        answer = httpx.request(
            verb, f"{self.url}/api{path}", headers=headers, json=body, timeout=60.0
        )
        if not answer.is_success:
            raise Unexpected(f"{verb} {path}: HTTP {answer.status_code} {answer.text}")
        return answer.json()

    def get(self, path: str) -> Any:
        """Read."""
        return self.call("GET", path)

    def post(self, path: str, body: Any) -> Any:
        """Make or order."""
        return self.call("POST", path, body)

    def workers(self, deployment: str, state: str = "warm") -> list[dict[str, Any]]:
        """The lines of `ps` with a connected worker in a state."""
        lines = self.get("/ps")["processes"]
        return [
            each
            for each in lines
            if each["deployment"] == deployment and (each["worker"] or {}).get("state") == state
        ]

    def unfinished(self) -> int:
        """How many requests have not ended."""
        counts: Mapping[str, int] = self.get("/status")["requests"]
        return sum(counts.values())
