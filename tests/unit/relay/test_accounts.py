"""Who is calling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Role, Token
from edif_hpc.errors import InvalidInput, NotAuthenticated, NotFound, StoreUnavailable
from edif_hpc.relay.accounts import Accounts, credential
from edif_hpc.testing.clock import ManualClock

T = TypeVar("T")


class Rows:
    """A store with one table, and a writer that can fail."""

    def __init__(self) -> None:
        self.tokens: dict[str, Token] = {}
        self.failure: Exception | None = None

    async def submit(self, op: Callable[[Any], T]) -> T:
        if self.failure is not None:
            raise self.failure
        return op(self)

    def add_token(self, token: Token) -> None:
        self.tokens[token.id] = token

    def limit_token(self, token_id: str, change: Callable[[Allowed], Allowed]) -> Token:
        if token_id not in self.tokens:
            raise NotFound(f"there is no token {token_id}")
        old = self.tokens[token_id]
        self.tokens[token_id] = replace(old, limits=change(old.limits))
        return self.tokens[token_id]

    def revoke_token(self, token_id: str, now: float) -> Token:
        self.tokens[token_id] = replace(self.tokens[token_id], revoked_at=now)
        return self.tokens[token_id]


@pytest.fixture
def rows() -> Rows:
    return Rows()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def accounts(rows: Rows, clock: ManualClock) -> Accounts:
    return Accounts(read=rows.tokens.values, writer=rows, clock=clock)


async def test_a_new_token_is_known_at_once_and_after_a_restart(
    accounts: Accounts, rows: Rows, clock: ManualClock
) -> None:
    token, text = await accounts.create(name=" Ada ", role=Role.OPERATOR)
    assert accounts.authenticate(text) == accounts.authenticate(f" {text}\n") == token
    assert (token.name, token.role) == ("Ada", Role.OPERATOR)
    assert text.partition("_")[2].partition("_")[2] not in repr(rows.tokens)
    later = Accounts(read=rows.tokens.values, writer=rows, clock=clock)
    with pytest.raises(NotAuthenticated):
        later.authenticate(text)
    later.restore()
    assert later.authenticate(text) == token


@pytest.mark.parametrize("text", [None, "", "uuid", "edif_x", "edif__y", "edif_é_é", "edif_a_b"])
async def test_what_is_no_token(accounts: Accounts, text: str | None) -> None:
    await accounts.create(name="Ada")
    with pytest.raises(NotAuthenticated):
        accounts.authenticate(text)


async def test_the_secret_counts(accounts: Accounts) -> None:
    token, text = await accounts.create(name="Ada")
    with pytest.raises(NotAuthenticated, match="unknown"):
        accounts.authenticate(text[:-1])
    with pytest.raises(NotAuthenticated, match="unknown"):
        accounts.authenticate(text.replace(token.id, "0" * 12))


async def test_expired_and_revoked(accounts: Accounts, clock: ManualClock) -> None:
    _, short = await accounts.create(name="short", expires_in_s=10)
    token, other = await accounts.create(name="other")
    clock.advance(10)
    with pytest.raises(NotAuthenticated, match="expired"):
        accounts.authenticate(short)
    await accounts.revoke(token.id)
    with pytest.raises(NotAuthenticated, match="revoked"):
        accounts.authenticate(other)


async def test_what_is_not_committed_does_not_hold(accounts: Accounts, rows: Rows) -> None:
    token, text = await accounts.create(name="Ada")
    rows.failure = StoreUnavailable("full")
    with pytest.raises(StoreUnavailable):
        await accounts.create(name="Eve")
    with pytest.raises(StoreUnavailable):
        await accounts.revoke(token.id)
    assert accounts.tokens() == [token]
    assert accounts.authenticate(text) == token


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": " "},
        {"name": "a\nb"},
        {"name": "x" * 81},
        {"queue_s": 0.0},
        {"limits": Allowed(wall_s=-1.0)},
        {"limits": Allowed(log_lines=0)},
    ],
)
async def test_senseless_tokens(accounts: Accounts, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput):
        await accounts.create(**({"name": "Ada"} | wrong))


async def test_limits_hold_once_they_are_committed(accounts: Accounts, rows: Any) -> None:
    token, text = await accounts.create(name="Ada", limits=Allowed(wall_s=5.0, log_lines=7))
    changed = await accounts.limit(token.id, lambda old: replace(old, wall_s=None, log_bytes=9))
    assert changed.limits == Allowed(log_lines=7, log_bytes=9)
    assert accounts.authenticate(text) == changed
    with pytest.raises(InvalidInput, match="log_lines"):
        await accounts.limit(token.id, lambda old: replace(old, log_lines=0))
    with pytest.raises(NotFound):
        await accounts.limit("nobody", lambda old: old)
    rows.failure = StoreUnavailable("full")
    with pytest.raises(StoreUnavailable):
        await accounts.limit(token.id, lambda _: Allowed())
    assert accounts.authenticate(text) == changed


@pytest.mark.parametrize(
    ("headers", "found"),
    [
        ({"ndif-api-key": "k"}, "k"),
        ({"authorization": "Bearer k"}, "k"),
        ({"authorization": "bearer  k "}, "k"),
        ({"authorization": "Basic k"}, None),
        ({"ndif-api-key": "k", "authorization": "Bearer other"}, "k"),
        ({}, None),
    ],
)
def test_where_the_token_is(headers: dict[str, str], found: str | None) -> None:
    assert credential(headers) == found
