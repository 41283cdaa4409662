"""Who may do what: tokens, their roles and limits.

A token is random, shown once and stored as a SHA-256 (it has 256 bits of entropy, so a slow hash adds nothing).
It has the form `edif_<id>_<secret>`; the id is public and names the owner of requests, the secret is never stored.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from enum import StrEnum

from edif_hpc.domain.limits import SAYS_NOTHING, Allowed
from edif_hpc.errors import NotAuthenticated, NotPermitted

TOKEN_PREFIX = "edif"  # noqa: S105 - the public prefix of every token, not a secret


class Role(StrEnum):
    """What a token is for."""

    RESEARCHER = "researcher"  #: sends requests and sees their own
    OPERATOR = "operator"  #: manages deployments, tokens and everybody's requests
    LAUNCHER = "launcher"  #: fetches orders of a site and reports on its jobs; nothing else


@dataclass(frozen=True, kw_only=True)
class Token:
    """A person's (or group's) key to the relay, without its secret. Times are wall clock, seconds since the epoch."""

    id: str
    name: str
    role: Role
    secret_sha256: str
    created_at: float
    expires_at: float | None = None
    revoked_at: float | None = None
    queue_s: float | None = None  #: how long its requests may wait; None takes the relay's default
    limits: Allowed = SAYS_NOTHING  #: what each of its requests may use
    keep: bool = False  #: its queued requests stay when the client's socket closes


def secret_hash(secret: str) -> str:
    """The stored form of a token's secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def format_token(token_id: str, secret: str) -> str:
    """The text that a person keeps."""
    return f"{TOKEN_PREFIX}_{token_id}_{secret}"


def parse_token(text: str) -> tuple[str, str]:
    """Split a token's text into its id and its secret."""
    prefix, _, rest = text.partition("_")
    token_id, _, secret = rest.partition("_")
    if prefix != TOKEN_PREFIX or not token_id or not secret:
        raise NotAuthenticated(
            "the API key does not have the form edif_<id>_<secret>; check NDIF_API_KEY, or ask the operator for a new one"
        )
    return token_id, secret


def check_token(token: Token | None, secret: str, now: float) -> Token:
    """Return the token if the secret is its own and it is in force; raise `NotAuthenticated` with the reason."""
    expected = token.secret_sha256 if token is not None else "0" * 64
    if not hmac.compare_digest(expected, secret_hash(secret)) or token is None:
        raise NotAuthenticated(
            "the API key is unknown; check NDIF_API_KEY, or ask the operator for a new one"
        )
    if token.revoked_at is not None:
        raise NotAuthenticated(
            f"the API key {token.id} ({token.name}) was revoked; ask the operator for a new one"
        )
    if token.expires_at is not None and token.expires_at <= now:
        raise NotAuthenticated(
            f"the API key {token.id} ({token.name}) has expired; ask the operator for a new one"
        )
    return token


def require(token: Token, *roles: Role) -> None:
    """Raise `NotPermitted` unless the token has one of the roles."""
    if token.role not in roles:
        needed = " or ".join(f"{'an' if role[0] in 'aeiou' else 'a'} {role}'s" for role in roles)
        raise NotPermitted(f"the API key {token.id} is a {token.role}'s; this needs {needed}")
