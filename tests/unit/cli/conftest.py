"""A relay that answers as a test says, and the command line run against it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edif_hpc.cli.main import main

TOKEN = "edif_0123456789ab_secret"

Answer = Callable[["Call"], Any]


@dataclass(frozen=True)
class Call:
    """What the stub was asked."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


class Refusal(Exception):
    """Answer with an error as the relay does."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        self.status, self.content = status, {"code": code, "detail": detail}


@dataclass
class Bytes:
    """Answer with bytes; `cut_after` closes the connection in the middle."""

    data: bytes
    cut_after: int | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class StubRelay:
    """A table of answers by method and path, and a record of what was asked."""

    url: str = ""
    answers: dict[tuple[str, str], Any] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def on(self, method: str, path: str, answer: Any) -> None:
        """Set an answer: a value, a function of the call, or an exception."""
        self.answers[method, path] = answer

    def refuse(self, method: str, path: str, status: int, code: str, detail: str) -> None:
        """Answer with an error as the relay does."""
        self.on(method, path, Refusal(status, code, detail))

    def send(self, method: str, path: str, data: bytes, **more: Any) -> None:
        """Answer with bytes."""
        self.on(method, path, Bytes(data, **more))

    def bodies(self, method: str, path: str) -> list[Any]:
        return [each.body for each in self.calls if (each.method, each.path) == (method, path)]

    def reply(self, call: Call) -> Bytes:
        self.calls.append(call)
        try:
            answer = self.answers.get((call.method, call.path))
            if answer is None:
                raise Refusal(404, "not_found", f"no such page: {call.method} {call.path}")
            if isinstance(answer, Exception):
                raise answer
            value = answer(call) if callable(answer) else answer
        except Refusal as refusal:
            return Bytes(json.dumps(refusal.content).encode(), status=refusal.status)
        return value if isinstance(value, Bytes) else Bytes(json.dumps(value).encode())


class _Handler(BaseHTTPRequestHandler):
    relay: StubRelay

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        content = json.loads(body) if body else None
        answer = self.relay.reply(Call(self.command, path, query, headers, content))
        self.send_response_only(answer.status)
        answer.headers.setdefault("date", self.date_time_string())
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(answer.data)))
        self.end_headers()
        self.wfile.write(answer.data[: answer.cut_after])

    do_GET = do_POST = do_DELETE = _serve  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be quiet."""


@pytest.fixture
def relay() -> Iterator[StubRelay]:
    """A stub on a free port."""
    stub = StubRelay()
    handler = type("Handler", (_Handler,), {"relay": stub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stub
        server.shutdown()
        thread.join()


@pytest.fixture
def environ(relay: StubRelay, tmp_path: Path) -> dict[str, str]:
    """The environment of an operator of the stub."""
    config = tmp_path / "config.toml"
    config.touch(mode=0o600)
    return {
        "EDIF_RELAY": relay.url,
        "EDIF_TOKEN": TOKEN,
        "EDIF_CONFIG": str(config),
        "EDIF_STATE_DIR": str(tmp_path / "local"),
        "EDIF_RELAY_DATA_DIR": str(tmp_path / "relay"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }


@pytest.fixture
def run(environ: dict[str, str]) -> Callable[..., Result]:
    """Run a command line."""

    def call(*arguments: str, **more: str) -> Result:
        return CliRunner().invoke(main, list(arguments), env=environ | more)

    return call


@pytest.fixture
def complain(run: Callable[..., Result]) -> Callable[..., str]:
    """Run a command line that must fail with this code; returns its one line."""

    def call(code: int, *arguments: str, **more: str) -> str:
        result = run(*arguments, **more)
        lines = result.stderr.splitlines()
        assert (result.exit_code, len(lines)) == (code, 1), result.output
        assert "Traceback" not in result.output
        return lines[0]

    return call
