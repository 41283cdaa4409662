"""`POST /request`, `GET /response`, and who may do what with them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import websocket

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.request import Limits
from edif_hpc.errors import StoreUnavailable
from edif_hpc.relay.sessions import Update
from edif_hpc.testing.wait import wait_until

if TYPE_CHECKING:
    from conftest import Relay

KIB = 1 << 10
MIB = 1 << 20


def subscribe(relay: Relay, token: str) -> tuple[Any, str]:
    connection = websocket.create_connection(
        relay.url.replace("http", "ws") + "/subscribe", header={"ndif-api-key": token}
    )
    return connection, json.loads(connection.recv())["session_id"]


def files_in(relay: Relay) -> list[str]:
    return sorted(each.name for each in relay.blob_root.iterdir())


@pytest.mark.parametrize("size", [1, 64 * KIB, 64 * KIB + 1, MIB, 5 * MIB + 17])
def test_a_blob_arrives_whole(relay: Relay, size: int) -> None:
    blob = os.urandom(size)
    answer = relay.post(blob=blob)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert body["status"] == "RECEIVED"
    assert body["id"] in body["description"]
    [request] = relay.broker.requests.values()
    assert relay.broker.bytes_of[request.id] == blob
    assert request.blob_sha256 == hashlib.sha256(blob).hexdigest()
    assert request.blob_bytes == size
    assert files_in(relay) == ([request.id] if size > 64 * KIB else [])


def test_the_accepted_request_has_its_limits(relay: Relay) -> None:
    assert relay.post(edif_timeout_s="90").status_code == 200
    [request] = relay.broker.requests.values()
    assert request.limits.wall_s == 90.0
    assert request.limits.sources["wall_s"] == "the header edif-timeout-s"
    sources = request.limits.sources
    assert request.limits == Limits(wall_s=90.0, request_bytes=8 * MIB, sources=sources)
    assert request.expires_at == relay.clock.wall() + 24 * 3600
    assert request.env == {"attn_implementation": "sdpa"}


@pytest.mark.parametrize("asked", ["0", "-1", "nan", "inf", "soon", "1e9"])
def test_a_senseless_timeout_is_refused(relay: Relay, asked: str) -> None:
    answer = relay.post(edif_timeout_s=asked)
    assert answer.status_code == 400
    assert "edif-timeout-s" in answer.json()["detail"]


def test_what_no_worker_lives_for_is_refused(relay: Relay) -> None:
    relay.fleet.longest_s = 600.0
    answer = relay.post(edif_timeout_s="601")
    assert answer.status_code == 400
    assert "at most 600 s" in answer.json()["detail"]
    assert relay.broker.requests == {}
    assert relay.post(edif_timeout_s="600").status_code == 200
    assert relay.post().status_code == 200
    assert [each.limits.wall_s for each in relay.broker.requests.values()] == [600.0, 600.0]


@pytest.mark.parametrize("version", ["", "0.5.15", "0.6.3", "0.7.0", "0.9.0", "1.0", "latest"])
def test_other_versions_are_told_what_to_install(relay: Relay, version: str) -> None:
    answer = relay.post(nnsight_version=version)
    assert answer.status_code == 400
    assert answer.json()["code"] == "unsupported_client"
    assert 'pip install "nnsight==0.8.*"' in answer.json()["detail"]


def test_an_old_clients_post_is_readable(relay: Relay) -> None:
    """nnsight 0.5 to 0.7 sends raw bytes with its metadata in headers."""
    with relay.client(relay.researcher) as client:
        answer = client.post(
            "/request",
            content=os.urandom(3 * MIB),
            headers={"nnsight-version": "0.7.0", "nnsight-model-key": "x"},
        )
        assert answer.status_code == 400
        assert "nnsight==0.8.*" in answer.json()["detail"]


def test_an_old_clients_socket_is_readable(relay: Relay) -> None:
    path = "/ws/socket.io/?transport=websocket&EIO=4"
    with pytest.raises(websocket.WebSocketBadStatusException, match=r"nnsight==0\.8") as caught:
        websocket.create_connection(relay.url.replace("http", "ws") + path)
    assert caught.value.status_code == 400
    with relay.client() as client:
        polled = client.get("/ws/socket.io/?transport=polling")
        assert polled.status_code == 400
        assert "nnsight==0.8.*" in polled.text


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"token": ""}, 401, "not_authenticated"),
        ({"token": "edif_aa_bb"}, 401, "not_authenticated"),
        ({"key": "os.path:{}"}, 400, "invalid_input"),
        ({"env": {"peft": "x/y"}}, 400, "invalid_input"),
        ({"env": {"attn_implementation": "org/kernel"}}, 400, "invalid_input"),
        ({"session": "nobody's"}, 404, "not_found"),
    ],
)
def test_refusals(relay: Relay, change: dict[str, Any], status: int, code: str) -> None:
    answer = relay.post(**change)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert not relay.broker.requests


def test_an_adapter_is_accepted_if_the_deployment_lists_it(relay: Relay) -> None:
    env = {"attn_implementation": "sdpa", "peft": "lab/lora"}
    refused = relay.post(env=env)
    assert refused.status_code == 400
    assert (
        "the PEFT adapter 'lab/lora' is not served with this model; served: none" in refused.text
    )
    listed = replace(relay.fleet.known[0], adapters=(Adapter(repo_id="lab/lora"),))
    relay.fleet.known[:] = [listed]
    assert relay.post(env=env).status_code == 200
    assert "served: lab/lora" in relay.post(env={"peft": "x/y"}).text
    relay.fleet.known[:] = [replace(listed, adapters=())]


def test_a_model_that_is_not_deployed(relay: Relay) -> None:
    answer = relay.post(key=relay.model_key.replace("tiny-gpt2", "huge"))
    assert answer.status_code == 404
    assert "edif/tiny-gpt2" in answer.json()["detail"]


def test_anothers_session_cannot_be_used(relay: Relay) -> None:
    connection, session_id = subscribe(relay, relay.researcher)
    assert relay.post(token=relay.other, session=session_id).status_code == 404
    assert relay.post(token=relay.researcher, session=session_id).status_code == 200
    connection.close()
    wait_until(lambda: len(relay.sessions) == 0, 5, "the session is closed")
    assert relay.post(token=relay.researcher, session=session_id).status_code == 404


def test_too_large_by_its_length(relay: Relay) -> None:
    """The client is still sending when the answer comes; it must get it all the same."""
    answer = relay.post(blob=bytes(40 * MIB))
    assert answer.status_code == 413
    assert answer.json()["code"] == "too_large"
    assert str(8 * MIB) in answer.json()["detail"]
    assert files_in(relay) == []


def test_a_token_and_a_deployment_may_take_less(relay: Relay) -> None:
    token_id = relay.accounts.authenticate(relay.other).id
    relay.run(relay.accounts.limit(token_id, lambda old: replace(old, request_bytes=MIB)))
    refused = relay.post(token=relay.other, blob=bytes(2 * MIB))
    assert refused.status_code == 413
    assert f"{MIB} are accepted from you" in refused.text
    assert relay.post(token=relay.other, blob=bytes(MIB // 2)).status_code == 200
    assert relay.post(blob=bytes(2 * MIB)).status_code == 200
    plain = relay.fleet.known[0]
    relay.fleet.known[:] = [replace(plain, limits=Allowed(request_bytes=3 * MIB))]
    assert relay.post(blob=bytes(4 * MIB)).status_code == 413
    assert relay.post(blob=bytes(2 * MIB)).status_code == 200
    relay.fleet.known[:] = [plain]
    assert len(files_in(relay)) == 3


def chunked(relay: Relay, size: int) -> httpx.Response:
    def body() -> Any:
        yield b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n{}\r\n'
        yield b'--B\r\nContent-Disposition: form-data; name="blob"; filename="r"\r\n\r\n'
        for _ in range(size // MIB):
            yield bytes(MIB)
        yield b"\r\n--B--\r\n"

    with relay.client(relay.researcher) as client:
        return client.post(
            "/request",
            content=body(),
            headers={
                "nnsight-version": "0.8.1",
                "content-type": "multipart/form-data; boundary=B",
            },
        )


def test_too_large_without_a_length(relay: Relay) -> None:
    answer = chunked(relay, 40 * MIB)
    assert answer.status_code == 413
    wait_until(lambda: files_in(relay) == [], 5, "the temporary file is gone")


def test_a_refused_client_may_finish_sending(relay: Relay) -> None:
    """A socket closed with unread bytes is reset, and a client that was sending loses the answer."""
    size = 40 * MIB
    with socket.create_connection(("127.0.0.1", relay.server.port), timeout=10) as raw:
        raw.sendall(b"POST /request HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % size)
        raw.sendall(bytes(size))
        received = b""
        while chunk := raw.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 401 ")
    assert received.endswith(b"}")


def test_who_goes_on_sending_is_cut_off(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(linger_s=0.2)
    with socket.create_connection(("127.0.0.1", relay.server.port)) as raw:
        raw.sendall(
            b"POST /request HTTP/1.1\r\nhost: x\r\nndif-api-key: "
            + relay.researcher.encode()
            + b"\r\nnnsight-version: 0.8.1\r\ncontent-length: 99999999999\r\n\r\n"
        )
        raw.settimeout(10)
        received = b""
        while chunk := raw.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in received.lower()


def test_who_waits_for_100_continue_gets_the_refusal_at_once(relay: Relay) -> None:
    with socket.create_connection(("127.0.0.1", relay.server.port)) as raw:
        raw.sendall(
            b"POST /request HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 99\r\n\r\n"
        )
        raw.settimeout(10)
        received = b""
        while chunk := raw.recv(65536):
            received += chunk
    assert received.startswith(b"HTTP/1.1 401 ")
    assert b"100 Continue" not in received


def test_an_aborted_upload_leaves_nothing(relay: Relay) -> None:
    with socket.create_connection(("127.0.0.1", relay.server.port)) as raw:
        raw.sendall(
            b"POST /request HTTP/1.1\r\nhost: x\r\nndif-api-key: "
            + relay.researcher.encode()
            + b"\r\nnnsight-version: 0.8.1\r\ncontent-length: 7000000\r\n"
            b"content-type: multipart/form-data; boundary=B\r\n\r\n"
            b'--B\r\nContent-Disposition: form-data; name="blob"; filename="r"\r\n\r\n'
        )
        raw.sendall(bytes(5 * MIB))
        wait_until(lambda: files_in(relay), 5, "the upload is on disk")
    wait_until(lambda: not files_in(relay), 5, "the temporary file is gone")
    assert relay.post().status_code == 200


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "ends without"),
        (b"no multipart", "not multipart"),
        (b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n{}\r\n--B--\r\n', "blob"),
        (b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n{}\r\n--B--\r\n', "unexpected"),
        (b"--B\r\nX: y\r\n\r\n{}\r\n--B--\r\n", "unexpected"),
        (
            b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n{}\r\n'
            b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n{}\r\n--B--\r\n',
            "unexpected",
        ),
        (
            b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n{}\r\n'
            b'--B\r\nContent-Disposition: form-data; name="blob"\r\n\r\ncut',
            "closing boundary",
        ),
        (
            b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n{"model_key": 3}\r\n'
            b'--B\r\nContent-Disposition: form-data; name="blob"\r\n\r\nx\r\n--B--\r\n',
            "model_key",
        ),
        (
            b'--B\r\nContent-Disposition: form-data; name="data"\r\n\r\n'
            + bytes(65 * KIB)
            + b"\r\n--B--\r\n",
            "envelope",
        ),
    ],
)
def test_malformed_bodies(relay: Relay, body: bytes, text: str) -> None:
    with relay.client(relay.researcher) as client:
        answer = client.post(
            "/request",
            content=body,
            headers={
                "nnsight-version": "0.8.1",
                "content-type": "multipart/form-data; boundary=B",
            },
        )
    assert answer.status_code in (400, 413)
    assert text in answer.json()["detail"]


def test_a_disk_that_cannot_be_written(relay: Relay, caplog: pytest.LogCaptureFixture) -> None:
    """Where the relay keeps its files is told to its operator, and to nobody else."""
    shutil.rmtree(relay.blob_root)
    answer = relay.post(blob=bytes(2 * MIB))
    assert answer.status_code == 503
    assert answer.json()["code"] == "store_unavailable"
    assert str(relay.blob_root.parent) not in answer.text
    assert str(relay.blob_root) in caplog.text


def test_a_disk_that_fills_up(relay: Relay) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        answer = relay.post(blob=bytes(6 * MIB))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert answer.status_code == 503
    assert answer.json()["code"] == "store_unavailable"
    assert files_in(relay) == []


def test_a_refusal_by_the_broker_leaves_no_file(relay: Relay) -> None:
    relay.broker.failure = StoreUnavailable("the disk is full")
    answer = relay.post(blob=bytes(2 * MIB))
    assert (answer.status_code, answer.json()["detail"]) == (503, "the disk is full")
    assert files_in(relay) == []


def test_an_unexpected_error_shows_no_traceback(
    relay: Relay, caplog: pytest.LogCaptureFixture
) -> None:
    relay.broker.failure = ZeroDivisionError("secret detail")
    answer = relay.post()
    assert answer.status_code == 500
    detail = answer.json()["detail"]
    assert "secret" not in answer.text
    [record] = [each for each in caplog.records if each.message == "unexpected error"]
    assert record.report in detail  # type: ignore[attr-defined]


def test_a_poll_is_for_the_owner_only(relay: Relay) -> None:
    request_id = relay.post().json()["id"]
    with relay.client(relay.other) as client:
        theirs = client.get(f"/response/{request_id}")
        nobodys = client.get(f"/response/{'0' * 32}")
    assert theirs.status_code == nobodys.status_code == 404
    assert theirs.json()["detail"].replace(request_id, "0" * 32) == nobodys.json()["detail"]
    with relay.client() as client:
        assert client.get(f"/response/{request_id}").status_code == 401


def test_a_repeated_poll_is_held_until_there_is_news(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(poll_hold_s=0.5)
    request_id = relay.post().json()["id"]

    def poll(client: httpx.Client) -> tuple[dict[str, Any], float]:
        begin = time.monotonic()
        answer = client.get(f"/response/{request_id}")
        assert answer.status_code == 200
        return answer.json(), time.monotonic() - begin

    with relay.client(relay.researcher) as client:
        first, _ = poll(client)
        views = relay.broker.views
        again, took = poll(client)
        assert first == again
        assert took >= 0.45
        assert relay.broker.views - views == 6, "it looks again while it holds"
        relay.broker.show(Update(request_id=request_id, status="RUNNING", description="x"))
        views = relay.broker.views
        news, _ = poll(client)
        assert news["status"] == "RUNNING"
        assert relay.broker.views - views == 1, "news is told at once"
        relay.broker.show(Update(request_id=request_id, status="ERROR", description="deleted"))
        for _ in range(2):
            views = relay.broker.views
            assert poll(client)[0]["status"] == "ERROR"
            assert relay.broker.views - views == 1, "an end is never held"


def test_public_routes(relay: Relay) -> None:
    with relay.client() as client:
        pong = client.get("/ping")
        assert pong.text == "pong"
        assert "edif-version" not in pong.headers, "strangers are not told"
        assert client.get("/connected").json() == {"status": "connected"}
        assert client.get("/status").json()["deployments"]["tiny-gpt2"]["repo_id"]
        assert client.get("/env").json()["python_version"] == "3.11.9"
        assert client.get("/whoami").status_code == 401
        unknown = client.get("/docs")
        assert (unknown.status_code, unknown.json()["code"]) == (404, "not_found")
        wrong = client.put("/request")
        assert wrong.status_code == 405


def test_the_version_is_for_those_who_show_a_token(relay: Relay) -> None:
    for token in (relay.researcher, relay.operator):
        with relay.client(token) as client:
            pong = client.get("/ping")
        assert pong.headers["edif-version"] == importlib.metadata.version("edif-hpc")


def test_headers(relay: Relay) -> None:
    with relay.client() as client:
        headers = client.get("/ping").headers
    assert "server" not in headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"


def test_the_result_link_uses_the_address_the_client_used(
    start_relay: Callable[..., Relay],
) -> None:
    for settings, expected in (
        ({}, None),
        ({"public_url": "https://relay.example/"}, "https://relay.example"),
    ):
        relay = start_relay(**settings)
        request_id = relay.post().json()["id"]
        relay.broker.complete(request_id, b"result", 6)
        with relay.client(relay.researcher) as client:
            url = client.get(f"/response/{request_id}").json()["data"]
        assert url.startswith((expected or relay.url) + "/results/")
