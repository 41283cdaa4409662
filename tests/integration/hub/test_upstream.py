"""Names that are not here: the real Hub behind the relay, played by other servers on the loopback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from edif_hpc.testing.wait import wait_until

if TYPE_CHECKING:
    from conftest import Relay

SECRET = "hf_averysecrettoken"
COMMIT = "c" * 40
CLIENT = """
import json, sys
import torch
from nnsight import LanguageModel
name = sys.argv[1]
meta, model = LanguageModel(name), LanguageModel(name, dispatch=True)
with model.trace("The Eiffel Tower"):
    logits = model.lm_head.output.save()
print(json.dumps({"key": meta.to_model_key(), "finite": bool(torch.isfinite(logits).all())}))
"""


class Server:
    """What the real Hub does that a simple one does not: redirects within, and to its storage; gates; cookies."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str]]] = []
        self.storage = ""
        self.url = ""
        self.app = Starlette(
            routes=[
                Route("/org/model/resolve/main/config.json", self.small),
                Route("/api/resolve-cache/config.json", self.cached),
                Route("/org/model/resolve/main/model.safetensors", self.large),
                Route("/org/model/resolve/main/unmeasured.bin", self.unmeasured),
                Route("/api/models/org/model", self.record),
                Route("/api/models/org/model/tree/refs%2Fpr%2F1", self.tree),
                Route("/api/models/org/model/tree/{rest:path}", self.tree),
                Route("/api/models/org/gated", self.gated),
                Route("/org/gated/resolve/main/config.json", self.gated),
                Route("/bytes", self.bytes),
                Route("/{rest:path}", self.nothing),
            ]
        )

    def note(self, http: Request) -> None:
        self.seen.append((http.scope["raw_path"].decode(), dict(http.headers)))

    async def small(self, http: Request) -> Response:
        self.note(http)
        headers = {"x-repo-commit": COMMIT, "etag": '"of-the-redirect"', "content-length": "0"}
        answer = RedirectResponse("/api/resolve-cache/config.json?x=1", 307, headers)
        answer.set_cookie("session", "of-another-user")
        return answer

    async def cached(self, http: Request) -> Response:
        self.note(http)
        return Response(b"{}", headers={"etag": '"small"'})

    async def large(self, http: Request) -> Response:
        self.note(http)
        headers = {
            "x-repo-commit": COMMIT,
            "x-linked-etag": '"large"',
            "x-linked-size": "123",
            "x-xet-hash": "e" * 64,
        }
        return RedirectResponse(f"{self.storage}/bytes?signature=1", 302, headers)

    async def unmeasured(self, http: Request) -> Response:
        self.note(http)
        headers = {"x-repo-commit": COMMIT, "x-linked-etag": '"large"', "content-length": "0"}
        return RedirectResponse(f"{self.storage}/bytes", 302, headers)

    async def record(self, http: Request) -> Response:
        self.note(http)
        return JSONResponse({"id": "org/model"})

    async def tree(self, http: Request) -> Response:
        self.note(http)
        link = f'<{self.url}/api/models/org/model/tree/main?cursor=2>; rel="next"'
        return JSONResponse([], headers={"link": link, "set-cookie": "a=b"})

    async def gated(self, http: Request) -> Response:
        self.note(http)
        headers = {"x-error-code": "GatedRepo", "x-error-message": "ask for access"}
        return JSONResponse({"error": "gated"}, 401, headers)

    async def nothing(self, http: Request) -> Response:
        self.note(http)
        return Response(status_code=404)

    async def bytes(self, http: Request) -> Response:
        self.note(http)
        return Response(b"weights")


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    config = uvicorn.Config(server.app, port=0, log_level="warning", lifespan="off")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        wait_until(lambda: running.started, 10, "the server serves")
        port = running.servers[0].sockets[0].getsockname()[1]
        server.url = f"http://127.0.0.1:{port}"
        yield server
    finally:
        running.should_exit = True
        thread.join()


@pytest.fixture
def storage() -> Iterator[Server]:
    with serving(Server()) as server:
        yield server


@pytest.fixture
def real(storage: Server) -> Iterator[Server]:
    with serving(Server()) as server:
        server.storage = storage.url
        yield server


@pytest.fixture
def behind(start_relay: Callable[..., Relay], real: Server) -> Relay:
    return start_relay(hub_upstream=real.url, hub_allow="org/*", log_level="debug")


def test_a_client_loads_an_allowed_model(
    start_relay: Callable[..., Relay], loopback_hub: str, run_client: Callable[..., Any]
) -> None:
    relay = start_relay(hub_upstream=loopback_hub, hub_allow="edif/tiny-gpt2", log_level="debug")
    seen = run_client(CLIENT, relay.hub, "edif/tiny-gpt2", HF_TOKEN=SECRET)
    assert seen["finite"]
    assert "edif/tiny-gpt2" in seen["key"]
    assert SECRET not in relay.log.read_text()
    kept = [each.read_bytes() for each in relay.data_dir.rglob("*") if each.is_file()]
    assert kept
    assert not any(SECRET.encode() in each for each in kept)


def test_a_small_file_is_described_and_pointed_at(behind: Relay, real: Server) -> None:
    with behind.http(token="") as http:
        answers = [
            http.request(m, "/hub/org/model/resolve/main/config.json") for m in ("HEAD", "GET")
        ]
    for answer in answers:
        assert answer.status_code == 307
        assert answer.headers["location"] == f"{real.url}/api/resolve-cache/config.json?x=1"
        assert answer.headers["etag"] == '"small"'
        assert answer.headers["x-repo-commit"] == COMMIT
        assert answer.headers["x-linked-size"] == "2"
    assert not any("cookie" in headers for _, headers in real.seen), (
        "one caller's cookie for another"
    )


def test_weights_come_from_the_hubs_storage(behind: Relay, storage: Server) -> None:
    with behind.http(SECRET) as http:
        head = http.head("/hub/org/model/resolve/main/model.safetensors")
        assert (head.status_code, head.headers["x-linked-size"]) == (307, "123")
        assert head.headers["location"] == f"{storage.url}/bytes?signature=1"
        assert head.headers["etag"] == '"large"'
        assert "x-xet-hash" not in head.headers
        assert http.get(head.headers["location"]).content == b"weights"
    assert len(storage.seen) == 1, "the relay itself never asks the storage"


def test_a_redirects_own_length_is_not_the_files(behind: Relay) -> None:
    with behind.http(token="") as http:
        head = http.head("/hub/org/model/resolve/main/unmeasured.bin")
    assert "x-linked-size" not in head.headers


def test_the_callers_token_goes_to_the_hub_alone(
    behind: Relay, real: Server, storage: Server
) -> None:
    with behind.http(SECRET) as http:
        http.head("/hub/org/model/resolve/main/config.json")
        http.head("/hub/org/model/resolve/main/model.safetensors")
        http.get("/hub/api/models/org/model")
    assert len(real.seen) == 4
    assert all(headers["authorization"] == f"Bearer {SECRET}" for _, headers in real.seen)
    assert not storage.seen
    assert SECRET not in behind.log.read_text()


def test_a_token_of_the_relay_stays_here(behind: Relay, real: Server) -> None:
    with behind.http() as http:
        assert http.get("/hub/api/models/org/model").json() == {"id": "org/model"}
    assert not any("authorization" in headers for _, headers in real.seen)


def test_the_next_page_leads_through_the_relay(behind: Relay, real: Server) -> None:
    with behind.http(token="") as http:
        answer = http.get("/hub/api/models/org/model/tree/refs%2Fpr%2F1", params={"cursor": "1"})
    assert f"<{behind.hub}/api/models/org/model/tree/main?cursor=2>" in answer.headers["link"]
    assert "set-cookie" not in answer.headers
    assert real.seen[0][0] == "/api/models/org/model/tree/refs%2Fpr%2F1"


def test_an_odd_spelling_is_no_failure(behind: Relay) -> None:
    with behind.http(token="") as http:
        assert http.get("/hub/org/model/resolve/main/%ff%00 \u20ac.json").status_code == 404


def test_the_hubs_refusals_are_passed_on(behind: Relay) -> None:
    with behind.http(token="") as http:
        for path in ("/hub/api/models/org/gated", "/hub/org/gated/resolve/main/config.json"):
            answer = http.get(path)
            assert (answer.status_code, answer.headers["x-error-code"]) == (401, "GatedRepo")
            assert answer.headers["x-error-message"] == "ask for access"


@pytest.mark.parametrize(
    "path",
    [
        "/hub/api/models/other/model",
        "/hub/api/models/org/..%2fother",
        "/hub/api/models/org/model/tree/main/%2e%2e/%2e%2e/%2e%2e/%2e%2e/datasets",
        "/hub/org/model/resolve/main/..%2f..%2f..%2f..%2fapi/whoami-v2",
        "/hub/api/whoami-v2",
        "/hub/api/models/org/model/discussions",
        "/hub/api/datasets/org/model",
    ],
)
def test_nothing_else_is_asked_for(behind: Relay, real: Server, path: str) -> None:
    with behind.http(SECRET) as http:
        assert http.get(path).status_code == 404
    assert real.seen == []


def test_a_hub_that_is_away(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(hub_upstream="http://127.0.0.1:9", hub_allow="*")
    with relay.http(token="") as http:
        answer = http.get("/hub/api/models/org/model")
    assert answer.status_code == 503
    assert "does not answer (ConnectError)" in answer.json()["detail"]


def test_a_hub_for_members_only(start_relay: Callable[..., Relay], real: Server) -> None:
    relay = start_relay(hub_upstream=real.url, hub_allow="*", hub_login=True)
    with relay.http(SECRET) as stranger, relay.http() as member:
        answer = stranger.get("/hub/api/models/org/model")
        assert answer.status_code == 401
        assert "set HF_TOKEN to it" in answer.json()["detail"]
        assert member.get("/hub/api/models/org/model").status_code == 200
    assert len(real.seen) == 1
    assert "authorization" not in real.seen[0][1]
