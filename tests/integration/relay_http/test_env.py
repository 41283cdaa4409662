"""`/api/env`: for everybody who has a token, with that token's limits; nnsight's `/env` is open and stays as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conftest import Relay


def test_a_token_is_needed(relay: Relay) -> None:
    with relay.client() as client:
        assert client.get("/api/env").status_code == 401
        assert set(client.get("/env").json()) == {"python_version", "packages"}


def test_a_researcher_sees_where_requests_run(relay: Relay) -> None:
    with relay.client(relay.researcher) as client:
        answer = client.get("/api/env")
    assert answer.status_code == 200
    [told] = answer.json()["deployments"]
    assert (told["name"], told["workers"]) == (relay.fleet.known[0].name, 0)
    assert told["limits"]["wall_s"]["value"] == 3600
