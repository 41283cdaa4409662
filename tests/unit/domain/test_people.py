"""Tokens: their text, when they count, and what they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.domain.people import (
    Role,
    Token,
    check_token,
    format_token,
    parse_token,
    require,
    secret_hash,
)
from edif_hpc.errors import NotAuthenticated, NotPermitted

TOKEN = Token(
    id="ada",
    name="Ada",
    role=Role.RESEARCHER,
    secret_sha256=secret_hash("secret"),
    created_at=100.0,
    expires_at=200.0,
)


@given(
    st.text(st.characters(exclude_characters="_"), min_size=1),
    st.text(min_size=1),
)
def test_a_token_comes_apart_as_it_was_put_together(token_id: str, secret: str) -> None:
    assert parse_token(format_token(token_id, secret)) == (token_id, secret)


@pytest.mark.parametrize(
    "text", ["", "edif", "edif_", "edif_ada", "edif_ada_", "edif__secret", "hf_ada_secret", "_a_b"]
)
def test_a_malformed_token_is_refused_without_being_repeated(text: str) -> None:
    with pytest.raises(NotAuthenticated, match="edif_<id>_<secret>") as refusal:
        parse_token(text)
    assert "hf_ada_secret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("token", "secret", "now", "reason"),
    [
        (TOKEN, "secret", 199.9, None),
        (replace(TOKEN, expires_at=None), "secret", 1e12, None),
        (TOKEN, "Secret", 150.0, "unknown"),
        (TOKEN, "", 150.0, "unknown"),
        (None, "secret", 150.0, "unknown"),
        (TOKEN, "secret", 200.0, "has expired"),
        (replace(TOKEN, revoked_at=120.0), "secret", 150.0, "was revoked"),
        (replace(TOKEN, revoked_at=120.0), "wrong", 150.0, "unknown"),
    ],
)
def test_a_token_counts_or_is_refused_with_the_reason(
    token: Token | None, secret: str, now: float, reason: str | None
) -> None:
    if reason is None:
        assert check_token(token, secret, now) is token
    else:
        with pytest.raises(NotAuthenticated, match=reason):
            check_token(token, secret, now)


def test_a_role_is_required() -> None:
    require(TOKEN, Role.RESEARCHER)
    with pytest.raises(NotPermitted, match="needs an operator's"):
        require(TOKEN, Role.OPERATOR)


def test_the_secret_is_not_in_its_stored_form() -> None:
    assert len(TOKEN.secret_sha256) == 64
    assert "secret" not in TOKEN.secret_sha256
