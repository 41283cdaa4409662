"""The envelope and the version gate."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edif_hpc.errors import InvalidInput, UnsupportedClient
from edif_hpc.relay.nnsight_schema import Envelope, check_version, parse_envelope


@pytest.mark.parametrize(
    "version", ["0.8", "0.8.0", "0.8.1", "0.8.0rc1", "0.8.2.dev3+g1a", "0.8rc2"]
)
def test_served_versions(version: str) -> None:
    assert check_version(f" {version} ") == version


@pytest.mark.parametrize(
    "version", [None, "", "0.7.0", "0.80.1", "0.9.0", "1.0.8", "0.8\n1", "nightly"]
)
def test_other_versions(version: str | None) -> None:
    with pytest.raises(UnsupportedClient, match=r'pip install "nnsight==0\.8') as caught:
        check_version(version)
    assert caught.value.http_status == 400


def test_an_envelope_with_defaults_and_unknown_fields() -> None:
    assert parse_envelope(b'{"model_key": "k", "later": 1}') == Envelope(model_key="k")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "model_key"),
        ({"model_key": 1}, "model_key"),
        ({"model_key": "k", "env": []}, "env"),
        ({"model_key": "k", "compress": "yes"}, "compress"),
    ],
)
def test_an_envelope_with_a_wrong_field(body: object, field: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        parse_envelope(json.dumps(body).encode())


@given(st.binary(max_size=200))
def test_any_bytes_are_an_envelope_or_invalid_input(raw: bytes) -> None:
    try:
        parse_envelope(raw)
    except InvalidInput:
        return
