"""Who is calling: tokens, kept in memory and written through to the store.

A token is looked up by its public id and compared by the hash of its secret, in the same time whether it exists or not.
The whole table is small, so a request costs no read of the database, and a revocation holds from its commit on.
nnsight sends the token as `ndif-api-key`; our own command line and other tools may use `Authorization: Bearer`.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Protocol, TypeVar

from edif_hpc.clock import Clock
from edif_hpc.domain.limits import SAYS_NOTHING, Allowed, checked
from edif_hpc.domain.people import Role, Token, check_token, format_token, parse_token, secret_hash
from edif_hpc.errors import InvalidInput, NotAuthenticated
from edif_hpc.store.base import Store

_T = TypeVar("_T")
_MAX_NAME = 80


class Submits(Protocol):
    """The part of the store's writer that is needed here."""

    def submit(self, op: Callable[[Store], _T]) -> Awaitable[_T]:
        """Run `op` in the next group; the awaitable ends after its commit."""


def credential(headers: Mapping[str, str]) -> str | None:
    """The token's text in the headers of a request."""
    scheme, _, bearer = headers.get("authorization", "").partition(" ")
    return headers.get("ndif-api-key") or (bearer.strip() if scheme.lower() == "bearer" else None)


class Accounts:
    """All tokens."""

    def __init__(
        self, *, read: Callable[[], Iterable[Token]], writer: Submits, clock: Clock
    ) -> None:
        self._read, self._writer, self._clock = read, writer, clock
        self._tokens: dict[str, Token] = {}

    def restore(self) -> None:
        """Read all tokens."""
        self._tokens = {each.id: each for each in self._read()}

    def authenticate(self, text: str | None) -> Token:
        """The token that a caller showed; raise `NotAuthenticated` with the reason."""
        if not text:
            raise NotAuthenticated(
                "no API key was sent; set NDIF_API_KEY to the one that your operator gave you"
            )
        token_id, secret = parse_token(text.strip())
        return check_token(self._tokens.get(token_id), secret, self._clock.wall())

    def tokens(self) -> list[Token]:
        """All, the oldest first, with the revoked and expired ones."""
        return list(self._tokens.values())

    async def create(
        self,
        *,
        name: str,
        role: Role = Role.RESEARCHER,
        expires_in_s: float | None = None,
        queue_s: float | None = None,
        limits: Allowed = SAYS_NOTHING,
        keep: bool = False,
    ) -> tuple[Token, str]:
        """A new token and the text that its owner keeps; the text cannot be had again."""
        if not name.strip() or len(name) > _MAX_NAME or not name.isprintable():
            raise InvalidInput(
                f"the name {name[:_MAX_NAME]!r} of a token must have 1-{_MAX_NAME} printable characters"
            )
        for what, value in (
            ("expires_in_s", expires_in_s),
            ("queue_s", queue_s),
        ):
            if value is not None and not value > 0:
                raise InvalidInput(f"{what} is {value}; it must be above 0")
        now = self._clock.wall()
        secret = secrets.token_urlsafe(32)
        token = Token(
            id=secrets.token_hex(6),
            name=name.strip(),
            role=role,
            secret_sha256=secret_hash(secret),
            created_at=now,
            expires_at=None if expires_in_s is None else now + expires_in_s,
            queue_s=queue_s,
            limits=checked(limits),
            keep=keep,
        )
        await self._writer.submit(lambda store: store.add_token(token))
        self._tokens[token.id] = token
        return token, format_token(token.id, secret)

    async def limit(self, token_id: str, change: Callable[[Allowed], Allowed]) -> Token:
        """Change what requests of a token may use, from now on. `NotFound` if there is none of that id."""
        token = await self._writer.submit(
            lambda store: store.limit_token(token_id, lambda old: checked(change(old)))
        )
        self._tokens[token_id] = token
        return token

    async def revoke(self, token_id: str) -> Token:
        """Revoke a token; its requests stay. `NotFound` if there is none of that id."""
        now = self._clock.wall()
        token = await self._writer.submit(lambda store: store.revoke_token(token_id, now))
        self._tokens[token_id] = token
        return token
