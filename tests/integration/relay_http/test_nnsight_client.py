"""The real, unmodified nnsight client against our routes."""

from __future__ import annotations

import asyncio
import io
import json
import platform
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import nnsight
import pytest
import torch
import websocket
import zstandard
from nnsight.intervention.backends.remote import (
    AsyncRemoteBackend,
    RemoteBackend,
    RemoteError,
)

from edif_hpc.relay.sessions import Update
from edif_hpc.testing.wait import wait_until

if TYPE_CHECKING:
    from conftest import Relay

VALUE = torch.arange(6.0).reshape(2, 3)


def saved(**values: Any) -> bytes:
    """A result as a worker makes it."""
    buffer = io.BytesIO()
    torch.save(values, buffer, pickle_protocol=4)
    return zstandard.ZstdCompressor(level=1).compress(buffer.getvalue())


def answer(relay: Relay, *updates: tuple[str, Any]) -> None:
    """Tell the session of each accepted request a list of (status, data) in order."""

    def on_accept(request: Any, session: Any) -> None:
        for status, data in updates:
            session.push(
                Update(
                    request_id=request.id,
                    status=status,
                    description=f"now {status}",
                    data=data,
                    meta={"attempt": 1},
                )
            )

    relay.broker.on_accept = on_accept


def trace(relay: Relay, backend: Any = None) -> tuple[Any, Any]:
    """One trace with a backend; returns it with what came back under the saved name."""
    model = nnsight.NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    backend = backend or RemoteBackend(relay.model_key, host=relay.url, api_key=relay.researcher)
    found = None
    with model.trace(torch.ones(1, 2), backend=backend):
        found = model.output.save()
    return backend, found


def test_a_blocking_trace_gets_its_inline_result(relay: Relay) -> None:
    blob = saved(found=VALUE)
    answer(relay, ("QUEUED", None), ("RUNNING", None), ("LOG", None), ("COMPLETED", blob))
    backend, found = trace(relay)
    assert torch.equal(found, VALUE)
    assert backend.meta == {"attempt": 1}
    [request] = relay.broker.requests.values()
    assert request.compress
    assert request.client == {
        "nnsight": version("nnsight"),
        "python": platform.python_version(),
    }
    wait_until(lambda: relay.broker.closed, 5, "the closed socket is noticed")
    assert len(relay.sessions) == 0


def test_an_error_arrives_as_remote_error(relay: Relay) -> None:
    answer(relay, ("ERROR", None))
    with pytest.raises(RemoteError, match="now ERROR"):
        trace(relay)


def test_a_non_blocking_trace_is_polled(relay: Relay) -> None:
    backend = RemoteBackend(
        relay.model_key, host=relay.url, api_key=relay.researcher, blocking=False
    )
    trace(relay, backend)
    assert backend() is None
    blob = saved(found=VALUE)
    relay.broker.complete(backend.job_id, blob, len(blob))
    result = backend()
    assert torch.equal(result["found"], VALUE)


def test_a_large_result_comes_from_a_file(relay: Relay) -> None:
    backend = RemoteBackend(
        relay.model_key, host=relay.url, api_key=relay.researcher, blocking=False
    )
    trace(relay, backend)
    values = torch.randn(1 << 20)
    blob = saved(found=values)
    path = relay.objects.path(f"{backend.job_id}/1")
    path.parent.mkdir(parents=True)
    path.write_bytes(blob)
    relay.broker.complete(backend.job_id, f"{backend.job_id}/1", len(blob))
    assert torch.equal(backend()["found"], values)


def test_an_awaited_trace(relay: Relay) -> None:
    answer(relay, ("QUEUED", None), ("COMPLETED", saved(found=VALUE)))
    backend = AsyncRemoteBackend(relay.model_key, host=relay.url, api_key=relay.researcher)
    trace(relay, backend)

    async def result() -> Any:
        return await backend

    assert torch.equal(asyncio.run(result())["found"], VALUE)


def test_a_client_that_does_not_listen_is_not_dropped(start_relay: Callable[..., Relay]) -> None:
    """It answers pings only while it listens; many unanswered ones must not cost it the socket."""
    relay = start_relay(ws_ping_interval_s=0.02)
    connection = websocket.create_connection(
        relay.url.replace("http", "ws") + "/subscribe", header={"ndif-api-key": relay.researcher}
    )
    session_id = json.loads(connection.recv())["session_id"]
    # 50 intervals pass on the server while this client does nothing; the real ratio is 60 s to 20 s.
    silent = threading.Event()
    relay.loop.call_soon_threadsafe(relay.loop.call_later, 1.0, silent.set)
    assert silent.wait(10)
    assert not relay.broker.closed
    assert relay.post(session=session_id).status_code == 200
    [request] = relay.broker.requests.values()
    done = Update(request_id=request.id, status="COMPLETED", data=b"late")
    session = relay.sessions.get(session_id, request.owner)
    relay.loop.call_soon_threadsafe(session.push, done)
    response = RemoteBackend.parse(connection.recv())
    assert response.data == b"late"
    connection.close()


def test_status_whoami_and_environment(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", relay.url)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", relay.researcher)
    status = nnsight.status()
    assert list(status) == ["edif/tiny-gpt2"]
    assert nnsight.ndif.whoami() == {"email": "researcher", "tags": ["researcher"]}
    assert nnsight.ndif.compare().remote_python == "3.11.9"


@pytest.mark.parametrize(("key", "text"), [("", "no API key"), ("edif_a_b", "unknown")])
def test_a_bad_key_is_told_apart(relay: Relay, key: str, text: str) -> None:
    with pytest.raises(websocket.WebSocketBadStatusException, match=text) as caught:
        websocket.create_connection(
            relay.url.replace("http", "ws") + "/subscribe", header={"ndif-api-key": key}
        )
    assert caught.value.status_code == 401


def test_the_clients_words_for_a_refused_post(relay: Relay) -> None:
    backend = RemoteBackend("builtins.object:{}", host=relay.url, api_key=relay.researcher)
    with pytest.raises(RemoteError, match=r"Failed to send request: the model class"):
        trace(relay, backend)


def test_who_is_over_a_rate_reads_why(start_relay: Callable[..., Relay]) -> None:
    """The unmodified client shows the relay's sentence, of a request and of a connection for updates."""
    relay = start_relay(request_rate=1, subscribe_rate=2, patience_s=0)
    answer(relay, ("COMPLETED", saved(found=VALUE)))
    for _ in range(10):
        trace(relay)
    with pytest.raises(
        RemoteError, match=r"too many requests from your token: 1 a second .* \(request_rate\)"
    ):
        trace(relay)
    for _ in range(9):
        connection = websocket.create_connection(
            relay.url.replace("http", "ws") + "/subscribe",
            header={"ndif-api-key": relay.researcher},
        )
        connection.close()
    with pytest.raises(websocket.WebSocketBadStatusException, match=r"\(subscribe_rate\)"):
        trace(relay)


def test_polls_are_never_refused(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay(poll_rate=1, poll_hold_s=0, patience_s=0)
    backend = RemoteBackend(
        relay.model_key, host=relay.url, api_key=relay.researcher, blocking=False
    )
    trace(relay, backend)
    assert {backend() for _ in range(15)} == {None}
