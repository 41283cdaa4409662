"""The server: TLS, a proxy in front, its address, its end."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import websocket
from starlette.applications import Starlette

from edif_hpc.errors import SettingsError
from edif_hpc.relay.http import serve
from edif_hpc.settings import RelaySettings
from edif_hpc.testing.wait import wait_until

if TYPE_CHECKING:
    from conftest import Relay


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A self-signed certificate of 127.0.0.1 and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["-x509", "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    files = ["-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", "req", *kind, *subject, *files], check=True, capture_output=True)
    return cert, key


def test_tls_ends_here(start_relay: Callable[..., Relay], certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    relay = start_relay(host="0.0.0.0", tls_cert=cert, tls_key=key)
    trust = ssl.create_default_context(cafile=str(cert))
    base = f"https://127.0.0.1:{relay.server.port}"
    with relay.client(relay.researcher, verify=trust) as client:
        answer = client.get(f"{base}/whoami")
    assert answer.json()["email"] == "researcher"
    assert "max-age" in answer.headers["strict-transport-security"]
    connection = websocket.create_connection(
        base.replace("https", "wss") + "/subscribe",
        header={"ndif-api-key": relay.researcher},
        sslopt={"ca_certs": str(cert)},
    )
    session = relay.sessions.get(json.loads(connection.recv())["session_id"], owner_of(relay))
    assert session.base_url == base
    connection.close()


def owner_of(relay: Relay) -> str:
    return relay.accounts.authenticate(relay.researcher).id


def test_a_bad_certificate_is_named(tmp_path: Path) -> None:
    cert = tmp_path / "cert.pem"
    settings = RelaySettings(port=0, tls_cert=cert, tls_key=cert)
    with pytest.raises(SettingsError, match=r"cert\.pem"):
        serve(Starlette(), settings)
    cert.write_text("nonsense")
    with pytest.raises(SettingsError, match=r"cert\.pem"):
        serve(Starlette(), settings)


@pytest.mark.parametrize(("believed", "scheme"), [(True, "https"), (False, "http")])
def test_forwarding_headers_count_behind_a_proxy_only(
    start_relay: Callable[..., Relay], believed: bool, scheme: str
) -> None:
    relay = start_relay(behind_proxy=believed)
    request_id = relay.post().json()["id"]
    relay.broker.complete(request_id, b"result", 6)
    with relay.client(
        relay.researcher,
        x_forwarded_proto="https",
        x_forwarded_for="192.0.2.7",
        host="relay.example",
    ) as client:
        url = client.get(f"/response/{request_id}").json()["data"]
    assert url.startswith(f"{scheme}://relay.example/results/")


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"port {port}"):
            serve(Starlette(), RelaySettings(port=port))


def test_stopping_tells_the_listeners(start_relay: Callable[..., Relay]) -> None:
    relay = start_relay()
    connection = websocket.create_connection(
        relay.url.replace("http", "ws") + "/subscribe", header={"ndif-api-key": relay.researcher}
    )
    connection.recv()
    relay.loop.call_soon_threadsafe(relay.server.stop)
    opcode, data = connection.recv_data(control_frame=True)
    assert (opcode, data[:2]) == (websocket.ABNF.OPCODE_CLOSE, (1012).to_bytes(2, "big"))
    assert connection.sock is not None
    connection.sock.close()
    wait_until(lambda: relay.broker.closed, 5, "the session is closed")


def test_who_begins_no_tls_is_counted_and_let_go(
    start_relay: Callable[..., Relay], certificate: tuple[Path, Path]
) -> None:
    """asyncio's own server would tell of a connection only after its handshake."""
    cert, key = certificate
    relay = start_relay(tls_cert=cert, tls_key=key, max_connections_per_address=2, head_s=0.5)
    with contextlib.ExitStack() as open_:
        silent = [
            open_.enter_context(socket.create_connection(("127.0.0.1", relay.server.port), 60))
            for _ in range(4)
        ]
        for each in silent:
            assert each.recv(100) == b"", "closed, without a word in the clear"
    wait_until(lambda: relay.server.door.open == 0, 60, "all are gone")
    trust = ssl.create_default_context(cafile=str(cert))
    with relay.client(relay.researcher, verify=trust) as client:
        assert client.get("/whoami").status_code == 200
