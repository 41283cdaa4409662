"""Signed, expiring links to the relay itself: who holds one may do this one thing until it expires.

A link is `path?expires=UNIX&sig=HMAC`, where the HMAC-SHA256 covers method, path and expiry under a secret that only the
relay has. Checks take the same time for every wrong signature.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from edif_hpc.errors import NotPermitted


@dataclass(frozen=True, kw_only=True)
class Signer:
    """Makes and checks links with one secret."""

    secret: bytes

    def link(self, method: str, path: str, *, expires_at: float) -> str:
        """`path` with its expiry and signature."""
        stamp = str(int(expires_at))
        return f"{path}?expires={stamp}&sig={self._sign(method, path, stamp)}"

    def check(self, method: str, path: str, expires: str, signature: str, now: float) -> None:
        """Raise `NotPermitted` unless the link is ours and in force."""
        if not hmac.compare_digest(self._sign(method, path, expires).encode(), signature.encode()):
            raise NotPermitted(
                "the link's signature is wrong; ask for a new link (poll the request again)"
            )
        if int(expires) < now:
            raise NotPermitted("the link has expired; ask for a new one (poll the request again)")

    def _sign(self, method: str, path: str, stamp: str) -> str:
        return hmac.new(
            self.secret, f"{method}\n{path}\n{stamp}".encode(), hashlib.sha256
        ).hexdigest()
