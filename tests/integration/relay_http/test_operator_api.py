"""`/api`: what the command line and the pages call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from edif_hpc.relay.operator_api import OperatorApi

if TYPE_CHECKING:
    from conftest import Relay

OPERATORS_ONLY = [
    ("GET", "/api/deployments", None),
    ("POST", "/api/deployments", {"repo_id": "a/b"}),
    ("DELETE", "/api/deployments/tiny-gpt2", None),
    ("POST", "/api/deployments/tiny-gpt2/replicas", {"replicas": 2}),
    ("POST", "/api/deployments/tiny-gpt2/limits", {"wall_s": 60}),
    ("GET", "/api/tokens", None),
    ("POST", "/api/tokens", {"name": "x"}),
    ("DELETE", "/api/tokens/x", None),
    ("POST", "/api/tokens/x/limits", {"wall_s": 60}),
    ("GET", "/api/ps", None),
    ("GET", "/api/status", None),
    ("POST", "/api/allocations", {"deployment": "tiny-gpt2", "site": "local"}),
    ("POST", "/api/allocations/a1/submitted", {"job_id": "7"}),
    ("POST", "/api/allocations/a1/failed", {"cause": "x"}),
    ("POST", "/api/drain", {}),
]
FOR_OWNERS = [("GET", ""), ("DELETE", ""), ("GET", "/explain"), ("GET", "/result")]


def call(relay: Relay, token: str, verb: str, path: str, body: Any = None) -> Any:
    with relay.client(token) as client:
        return client.request(verb, path, json=body)


@pytest.mark.parametrize(("verb", "path", "body"), OPERATORS_ONLY)
def test_operators_only(relay: Relay, verb: str, path: str, body: Any) -> None:
    assert call(relay, "", verb, path, body).status_code == 401
    assert call(relay, relay.researcher, verb, path, body).status_code == 403
    assert not relay.fleet.orders


def test_every_route_is_in_a_table() -> None:
    """A new route has to say here who may call it."""
    nothing: Any = None
    api = OperatorApi(
        broker=nothing,
        fleet=nothing,
        accounts=nothing,
        sessions=nothing,
        limits=nothing,
        public_url=None,
    )
    [mount] = api.routes()
    found = {
        (verb, "/api" + route.path)
        for route in mount.routes  # type: ignore[attr-defined]
        for verb in route.methods - {"HEAD"}
    }
    known = {(verb, path) for verb, path, _ in OPERATORS_ONLY}
    known |= {(verb, "/api/requests/{id}" + path) for verb, path in FOR_OWNERS}
    known |= {("GET", "/api/requests"), ("GET", "/api/limits"), ("POST", "/api/join")}
    renamed = {
        (verb, path.replace("/a1/", "/{id}/").replace("tokens/x", "tokens/{id}"))
        for verb, path in known
    }
    assert found == {
        (verb, path.replace("deployments/tiny-gpt2", "deployments/{name}"))
        for verb, path in renamed
    }


def test_deployments(relay: Relay) -> None:
    made = call(relay, relay.operator, "POST", "/api/deployments", {"repo_id": "Org/Big.Model"})
    assert made.status_code == 201
    assert made.json()["name"] == "big-model"
    listed = call(relay, relay.operator, "GET", "/api/deployments").json()["deployments"]
    assert [each["name"] for each in listed] == ["tiny-gpt2", "big-model"]
    gone = call(relay, relay.operator, "DELETE", "/api/deployments/tiny-gpt2?force=true")
    assert gone.json() == {"ended_requests": 2}
    assert relay.fleet.orders == [("remove", "tiny-gpt2", True)]


def test_adapters_are_shown_as_they_were_listed(relay: Relay) -> None:
    listed = [{"repo_id": "a/lora", "revision": "c0ffee"}, {"repo_id": "a/other"}]
    made = call(
        relay, relay.operator, "POST", "/api/deployments", {"repo_id": "a/b", "adapters": listed}
    )
    assert made.json()["adapters"] == [listed[0], {"repo_id": "a/other", "revision": None}]
    shown = call(relay, relay.operator, "GET", "/api/deployments").json()["deployments"]
    assert [each["adapters"] for each in shown] == [[], made.json()["adapters"]]


def test_tasks_are_kept_as_clients_send_them(relay: Relay) -> None:
    body = {"repo_id": "a/b", "task": "ner", "more_tasks": ["fill-mask", "token-classification"]}
    made = call(relay, relay.operator, "POST", "/api/deployments", body).json()
    assert (made["task"], made["more_tasks"]) == ("token-classification", ["fill-mask"])


def test_the_way_of_weights_is_kept(relay: Relay) -> None:
    body = {"repo_id": "a/b", "device": "cuda", "weights": "shared"}
    made = call(relay, relay.operator, "POST", "/api/deployments", body).json()
    assert (made["weights"], made["device"]) == ("shared", "cuda")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"repo_id": "a/b", "replica": 2}, "replica"),
        ({"repo_id": "a/b", "weights": "shared"}, "are for a GPU"),
        ({"repo_id": "a/b", "weights": "lent"}, "auto, private, shared"),
        ({"repo_id": "a/b", "more_tasks": "fill-mask"}, "more_tasks"),
        ({"repo_id": "a/b", "adapters": [{"repo_id": "lora"}]}, "'lora' must be ORG/NAME"),
        ({"repo_id": "a/b", "adapters": [{"repo_id": "a/*"}]}, "'a/*' must be ORG/NAME"),
        ({"repo_id": "a/b", "adapters": [{"repo_id": "a/l", "revision": "x y"}]}, "revision"),
        ({"repo_id": "a/b", "adapters": [{"repo_id": "a/l"}] * 2}, "'a/l' is listed twice"),
        ({"repo_id": "a/b", "replicas": -1}, "replicas"),
        ({"repo_id": "a/b", "name": "No Good"}, "No Good"),
        ({}, "repo_id"),
        (7, "object"),
    ],
)
def test_a_bad_body_names_its_field(relay: Relay, body: Any, text: str) -> None:
    answer = call(relay, relay.operator, "POST", "/api/deployments", body)
    assert answer.status_code == 400
    assert text in answer.json()["detail"]


def test_a_body_has_a_limit(relay: Relay) -> None:
    body = {"repo_id": "x" * (2 << 20)}
    assert call(relay, relay.operator, "POST", "/api/deployments", body).status_code == 413


def test_tokens(relay: Relay) -> None:
    made = call(
        relay, relay.operator, "POST", "/api/tokens", {"name": "Ada", "role": "researcher"}
    )
    assert made.status_code == 201
    text, token_id = made.json()["token"], made.json()["id"]
    assert relay.post(token=text).status_code == 200
    listed = call(relay, relay.operator, "GET", "/api/tokens")
    assert "Ada" in listed.text
    assert "secret" not in listed.text
    assert call(relay, relay.operator, "DELETE", f"/api/tokens/{token_id}").status_code == 200
    refused = relay.post(token=text)
    assert refused.status_code == 401
    assert "revoked" in refused.json()["detail"]
    assert call(relay, relay.operator, "DELETE", "/api/tokens/none").status_code == 404


def test_a_bearer_token_works_too(relay: Relay) -> None:
    with relay.client(authorization=f"Bearer {relay.operator}") as client:
        assert client.get("/api/ps").json()["processes"][0]["state"] == "warm"


def test_requests_are_seen_by_owner_and_operator(relay: Relay) -> None:
    mine = relay.post().json()["id"]
    theirs = relay.post(token=relay.other).json()["id"]

    def ids(token: str, query: str = "") -> list[str]:
        answer = call(relay, token, "GET", f"/api/requests{query}")
        return [each["id"] for each in answer.json()["requests"]]

    assert ids(relay.researcher) == [mine]
    assert ids(relay.operator) == [mine, theirs]
    assert ids(relay.operator, "?state=running") == []
    assert ids(relay.operator, "?limit=1") == [mine]
    owner = relay.broker.requests[theirs].owner
    assert ids(relay.operator, f"?owner={owner}") == [theirs]
    assert ids(relay.researcher, f"?owner={owner}") == [mine]
    for query in ("?state=lost", "?limit=0", "?limit=x"):
        assert call(relay, relay.operator, "GET", f"/api/requests{query}").status_code == 400


@pytest.mark.parametrize(("verb", "path"), FOR_OWNERS)
def test_anothers_request_does_not_exist(relay: Relay, verb: str, path: str) -> None:
    request_id = relay.post().json()["id"]
    relay.broker.complete(request_id, b"result", 6)
    target = f"/api/requests/{request_id}{path}"
    assert call(relay, "", verb, target).status_code == 401
    assert call(relay, relay.other, verb, target).status_code == 404
    assert not relay.broker.cancelled
    assert call(relay, relay.researcher, verb, target).status_code == 200
    assert call(relay, relay.operator, verb, target).status_code == 200


def test_a_request_is_shown_without_what_is_ours(relay: Relay) -> None:
    request_id = relay.post().json()["id"]
    shown = call(relay, relay.researcher, "GET", f"/api/requests/{request_id}").json()
    assert shown["shown"] == "QUEUED"
    assert shown["description"] == "position 1"
    assert not {"holder", "blob_sha256"} & set(shown)


def test_who_cancelled_is_told(relay: Relay) -> None:
    request_id = relay.post().json()["id"]
    call(relay, relay.researcher, "DELETE", f"/api/requests/{request_id}")
    call(relay, relay.operator, "DELETE", f"/api/requests/{request_id}")
    assert relay.broker.cancelled == [
        (request_id, "its owner"),
        (request_id, "the operator operator"),
    ]


def test_the_result_is_a_link(relay: Relay) -> None:
    request_id = relay.post().json()["id"]
    target = f"/api/requests/{request_id}/result"
    early = call(relay, relay.researcher, "GET", target)
    assert early.status_code == 409
    assert "QUEUED" in early.json()["detail"]
    relay.broker.complete(request_id, b"result", 6)
    link = call(relay, relay.researcher, "GET", target).json()
    assert (link["compress"], link["size_bytes"]) == (True, 6)
    with relay.client() as client:
        assert client.get(link["url"]).content == b"result"


def test_allocations(relay: Relay) -> None:
    asked = {"deployment": "tiny-gpt2", "site": "local", "slots": 1}
    made = call(relay, relay.operator, "POST", "/api/allocations", asked)
    assert made.json()["allocations"][0]["join_token"] == "once"
    call(relay, relay.operator, "POST", "/api/allocations/a1/submitted", {"job_id": "7"})
    call(relay, relay.operator, "POST", "/api/allocations/a1/failed", {"cause": "dead"})
    path = "/api/deployments/tiny-gpt2/replicas"
    assert call(relay, relay.operator, "POST", path, {"replicas": 3}).status_code == 200
    assert call(relay, relay.operator, "POST", path, {"replicas": -1}).status_code == 400
    drained = call(relay, relay.operator, "POST", "/api/drain", {"allocation": "a1"})
    assert drained.json() == {"allocations": 1}
    assert relay.fleet.orders == [
        ("allocate", "tiny-gpt2", "local", 1),
        ("submitted", "a1", "7"),
        ("failed", "a1", "dead", ""),
        ("scale", "tiny-gpt2", 3),
        ("drain", None, "a1"),
    ]


def test_the_join_token_is_the_credential(relay: Relay) -> None:
    body = {"join_token": "once", "worker_key": "w" * 40, "pilot_key": "p" * 40, "node": "n1"}
    assert call(relay, "", "POST", "/api/join", body).json()["endpoint"] == "tcp://relay:1"
    spent = call(relay, "", "POST", "/api/join", body | {"join_token": "twice"})
    assert spent.status_code == 401
    short = call(relay, "", "POST", "/api/join", body | {"worker_key": "w"})
    assert short.status_code == 400


def test_status(relay: Relay) -> None:
    relay.post()
    status = call(relay, relay.operator, "GET", "/api/status").json()
    assert status["requests"] == {"QUEUED": 1, "DISPATCHED": 0, "RUNNING": 0}
    assert status["sessions"] == 0


def test_limits_of_a_deployment_and_of_a_token(relay: Relay) -> None:
    """Each is changed field by field; a researcher sees what results, and who says so."""
    path = "/api/deployments/tiny-gpt2/limits"
    changed = call(relay, relay.operator, "POST", path, {"memory_bytes": 5000, "log_lines": 7})
    assert changed.json()["limits"]["memory_bytes"] == 5000
    changed = call(relay, relay.operator, "POST", path, {"log_lines": None})
    assert (changed.json()["limits"]["memory_bytes"], changed.json()["limits"]["log_lines"]) == (
        5000,
        None,
    )
    for wrong in ({"wall_s": 0}, {"log_lines": -1}, {"wall": 5}, {"log_lines": 1.5}):
        assert call(relay, relay.operator, "POST", path, wrong).status_code == 400, wrong
    made = call(
        relay, relay.operator, "POST", "/api/tokens", {"name": "eve", "limits": {"wall_s": 9}}
    ).json()
    path = f"/api/tokens/{made['id']}/limits"
    limits = call(relay, relay.operator, "POST", path, {"memory_bytes": 4000}).json()["limits"]
    assert (limits["wall_s"], limits["memory_bytes"]) == (9.0, 4000)
    told = call(relay, made["token"], "GET", "/api/limits").json()["deployments"]["tiny-gpt2"]
    assert told["limits"]["wall_s"] == {"value": 9.0, "set_by": "the token eve"}
    assert told["limits"]["memory_bytes"] == {"value": 4000, "set_by": "the token eve"}
    assert told["limits"]["log_lines"] == {"value": 10_000, "set_by": "the relay"}
    told = call(relay, relay.researcher, "GET", "/api/limits").json()["deployments"]["tiny-gpt2"]
    assert told["limits"]["memory_bytes"]["set_by"] == "the deployment tiny-gpt2"
    assert call(relay, "", "GET", "/api/limits").status_code == 401


def test_limits_of_requests_that_were_accepted_before_stay(relay: Relay) -> None:
    assert relay.post().status_code == 200
    call(relay, relay.operator, "POST", "/api/deployments/tiny-gpt2/limits", {"log_lines": 7})
    assert relay.post().status_code == 200
    lines = [each.limits.log_lines for each in relay.broker.requests.values()]
    assert lines == [10_000, 7]
