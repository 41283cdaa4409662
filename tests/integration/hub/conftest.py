"""A relay process with a hub, its operator's command line, and unmodified clients in fresh processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from edif_hpc.relay.app import init_data_dir
from edif_hpc.settings import RelaySettings

SERVE = """
import sys
from pathlib import Path
from edif_hpc.relay.app import serve
from edif_hpc.settings import RelaySettings, load
serve(load(RelaySettings, flags={}, environ={}, file=Path(sys.argv[1])))
"""
TIMEOUT_S = 120


@dataclass(kw_only=True)
class Relay:
    """A relay process; what it writes goes to `log`."""

    folder: Path
    token: str
    settings: dict[str, Any]
    process: subprocess.Popen[str]
    url: str

    @property
    def hub(self) -> str:
        return f"{self.url}/hub"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    def cli(self, *arguments: str, code: int = 0) -> str:
        """Run `edif-hpc` as the operator."""
        environ = {"PATH": os.environ["PATH"], "EDIF_RELAY": self.url, "EDIF_TOKEN": self.token}
        environ["HOME"] = str(self.folder)
        run = subprocess.run(
            [sys.executable, "-m", "edif_hpc.cli.main", *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert run.returncode == code, run.stderr
        return run.stdout if code == 0 else run.stderr

    def deploy(self, repo_id: str, source: Path | str | None = None, **more: Any) -> None:
        """Add a deployment, as `edif-hpc deployment add` does."""
        body = {"repo_id": repo_id, **more} | ({"source": str(source)} if source else {})
        with self.http() as http:
            answer = http.post("/api/deployments", json=body)
        assert answer.status_code == 201, answer.text

    def http(self, token: str | None = None) -> httpx.Client:
        """An operator's HTTP client, or someone else's."""
        told = self.token if token is None else token
        headers = {"authorization": f"Bearer {told}"} if told else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30, trust_env=False)

    def restart(self) -> None:
        """The same data, a new process."""
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=30)
        self.process, self.url = _start(self.folder, self.settings)


def _start(folder: Path, settings: dict[str, Any]) -> tuple[subprocess.Popen[str], str]:
    file = folder / "config.toml"
    told = {"data_dir": str(folder / "data"), "port": 0, "worker_bind": "tcp://127.0.0.1:*"}
    rows = [f"{name} = {json.dumps(value)}" for name, value in (told | settings).items()]
    file.write_text("[relay]\n" + "\n".join(rows))
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(file)], stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdout is not None
    line = process.stdout.readline()  # "relay ready: URL (...)"
    if not line.startswith("relay ready: "):
        _end(process)
        pytest.fail((folder / "log").read_text())
    return process, line.split()[2]


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def start_relay(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    """Start relays with these settings; they end with the test."""
    relays: list[Relay] = []

    def start(**settings: Any) -> Relay:
        folder = tmp_path / f"relay-{len(relays)}"
        folder.mkdir()
        token = init_data_dir(RelaySettings(data_dir=folder / "data"), operator_name="operator")
        process, url = _start(folder, settings)
        relay = Relay(folder=folder, token=token, settings=settings, process=process, url=url)
        relays.append(relay)
        return relay

    yield start
    for each in relays:
        _end(each.process)


@pytest.fixture
def relay(start_relay: Callable[..., Relay]) -> Relay:
    return start_relay()


@pytest.fixture
def run_client(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run a script in a fresh process with an empty cache; returns the JSON that it printed last."""

    def run(script: str, endpoint: str, *arguments: str, **more: str) -> dict[str, Any]:
        folder = tmp_path / f"client-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "client.py").write_text(script)  # nnsight reads the block's source from a file
        environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "HF_HOME": str(folder / "hf"),
            "HF_ENDPOINT": endpoint,
            **more,
        }
        done = subprocess.run(
            [sys.executable, str(folder / "client.py"), *arguments],
            env=environ,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return seen

    return run
