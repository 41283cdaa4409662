"""What `edif-hpc demo` does: the steps that an operator and a researcher take, on one machine.

Every step but the hub's is a command that can be typed; it is shown, and run as a process of its own. All that the demo makes
lies in one temporary folder, and nothing of the user's own settings reaches it. Whatever way it ends, by success, failure,
Ctrl-C or a closed terminal, its processes and its folder are gone; with `--keep` they stay, and a note says what they are.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from edif_hpc.cli import children
from edif_hpc.cli.children import Process
from edif_hpc.cli.context import Context
from edif_hpc.clock import SystemClock
from edif_hpc.errors import Conflict, LaunchError, NotFound

MODEL = "edif/tiny-gpt2"
GRACE_S = 20.0
_START_S = 60.0
_HURRY_S = 5.0
_CLI = "edif_hpc.cli.main"
_HOST = "127.0.0.1"
_FOREIGN = ("EDIF_", "HF_", "HUGGING_FACE_", "NDIF_", "NNSIGHT_", "TRANSFORMERS_")
_BUILD = (
    "import pathlib, sys; from edif_hpc.testing.models import build_tiny_gpt2; "
    "build_tiny_gpt2(pathlib.Path(sys.argv[1]))"
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The demo's folder, and the environment of the processes in it."""

    folder: Path
    environ: dict[str, str]

    @classmethod
    def at(cls, ctx: Context, folder: Path) -> Stage:
        """Nothing that the user has set for relays, hubs or nnsight reaches the demo."""
        (folder / "tmp").mkdir(exist_ok=True)
        own = {
            "TMPDIR": str(folder / "tmp"),
            "EDIF_CONFIG": str(folder / "config.toml"),
            "EDIF_STATE_DIR": str(folder / "local"),
            "HF_HOME": str(folder / "hub-cache"),
            "NNSIGHT_CONFIG": str(folder / "nnsight.yaml"),
            "NNSIGHT_DEBUG": "1",  # one line for each status
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        clean = {k: v for k, v in ctx.environ.items() if not k.startswith(_FOREIGN)}
        return cls(folder=folder, environ=clean | own)

    def command(self, *arguments: str) -> None:
        """Show a command and run it."""
        click.secho(f"\n$ edif-hpc {' '.join(arguments)}", bold=True)
        self.python("-m", _CLI, *arguments)

    def python(self, *arguments: str, capture: bool = False) -> str:
        """Run Python in this environment; returns what it printed, if that is captured."""
        done = subprocess.run(  # noqa: S603 - this very interpreter
            [sys.executable, *arguments],
            env=self.environ,
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
        if done.returncode:
            raise LaunchError(
                f"that step ended with exit code {done.returncode}; the demo ends here"
            )
        return done.stdout or ""

    def server(self, *arguments: str, until: str) -> str:
        """Start a server, and return the line by which it says that it is ready."""
        log = self.folder / f"{arguments[0].rpartition('.')[2]}.log"
        return children.start(
            arguments, environ=self.environ, log=log, until=until, timeout_s=_START_S
        )

    def with_hub(self, url: str) -> Stage:
        """The same with the hub's address."""
        return Stage(folder=self.folder, environ=self.environ | {"HF_ENDPOINT": url})

    def with_token(self, relay: str, token: str) -> Stage:
        """The same as a researcher sees it."""
        return Stage(
            folder=self.folder, environ=self.environ | {"NDIF_HOST": relay, "NDIF_API_KEY": token}
        )


def show(ctx: Context, *, keep: bool) -> None:
    """Run the demo."""
    note = _note(ctx)
    if note.exists():
        raise Conflict("a demo that was kept is still there; end it first: edif-hpc demo --stop")
    began = SystemClock().monotonic()
    children.adopt_orphans()
    with _ending_in_order(keep=keep, folder=Path(tempfile.mkdtemp(prefix="edif-demo-"))) as folder:
        stage = _raise_curtain(Stage.at(ctx, folder))
        researcher = _research(stage)
        if keep:
            _keep(researcher, note)
        else:
            stage.command("down", "--all", "--wait", "--timeout", "60s")
    if not keep:
        took = SystemClock().monotonic() - began
        click.secho(f"\nthe demo took {took:.0f} s; nothing of it is left running", bold=True)


def stop_kept(ctx: Context) -> None:
    """End a demo that was kept."""
    note = _note(ctx)
    try:
        kept = json.loads(note.read_text())
    except FileNotFoundError:
        raise NotFound("no demo was kept; start one with: edif-hpc demo --keep") from None
    processes = [Process(**each) for each in kept["processes"]]
    if any(each.alive for each in processes):
        _drain(Stage.at(ctx, Path(kept["folder"])))
    children.end(processes, GRACE_S)
    shutil.rmtree(kept["folder"], ignore_errors=True)
    note.unlink()
    left = [each.pid for each in processes if each.alive]
    if left:
        raise LaunchError(f"these processes do not end: {left}")
    click.echo("the demo is gone")


def _drain(stage: Stage) -> None:
    """Let the workers leave in order, also those that were started since; if they don't, they are ended anyhow."""
    try:
        stage.command("down", "--all", "--wait", "--timeout", "30s")
    except LaunchError as error:
        click.echo(f"the workers did not leave in order: {error}", err=True)


def _raise_curtain(stage: Stage) -> Stage:
    """Hub, relay, worker and a researcher's token."""
    _say("A relay, a worker and a remote trace, all on this machine.")
    _say("1. A model hub on the loopback interface, with a tiny GPT-2 made on the spot.")
    model = stage.folder / "tiny-gpt2"
    stage.python("-c", _BUILD, str(model))
    hub = stage.server("edif_hpc.testing.hub", "--model", f"{MODEL}={model}", until="http://")
    stage = stage.with_hub(hub)
    _say("2. The operator makes a relay and runs it.")
    places = ("--data-dir", str(stage.folder / "relay"), "--port", str(_free_port()))
    stage.command("relay", "init", *places, "--worker-bind", f"tcp://{_HOST}:*")
    click.secho("\n$ edif-hpc relay serve &", bold=True)
    click.echo(stage.server(_CLI, "relay", "serve", until="relay ready"))
    _say(
        "3. The operator starts a worker: an allocation of the local site, submitted through submitit."
    )
    stage.command("up", MODEL, "--wait", "--timeout", "120s")
    stage.command("ps")
    return stage


def _research(stage: Stage) -> Stage:
    _say("4. A researcher gets a token, and runs ordinary nnsight code in a process of its own.")
    click.secho("$ edif-hpc token create researcher", bold=True)
    made = stage.python("-m", _CLI, "token", "create", "researcher", "--json", capture=True)
    token = json.loads(made)["token"]
    relay = tomllib.loads((stage.folder / "config.toml").read_text())["client"]["relay"]
    click.echo(f"export NDIF_HOST={relay} NDIF_API_KEY={token}")
    researcher = stage.with_token(relay, token)
    click.secho("\n$ python -m edif_hpc.testing.demo_client", bold=True)
    researcher.python("-m", "edif_hpc.testing.demo_client")
    _say("5. What the relay remembers of it.")
    stage.command("request", "ls")
    return researcher


def _keep(stage: Stage, note: Path) -> None:
    """Write down what runs, for --stop, and say how to use it."""
    note.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    processes = [each.as_dict() for each in children.children()]
    note.write_text(json.dumps({"folder": str(stage.folder), "processes": processes}))
    _say("It is left running. In a shell of a researcher:")
    names = ("NDIF_HOST", "NDIF_API_KEY", "HF_ENDPOINT")
    click.echo("export " + " ".join(f"{name}={stage.environ[name]}" for name in names))
    click.echo(
        f"python -m edif_hpc.testing.demo_client   # or your own code, with the model {MODEL}"
    )
    _say("In a shell of the operator:")
    names = ("EDIF_CONFIG", "EDIF_STATE_DIR", "HF_ENDPOINT")
    click.echo("export " + " ".join(f"{name}={stage.environ[name]}" for name in names))
    click.echo("edif-hpc ps")
    _say("And to end it:")
    click.echo("edif-hpc demo --stop")


@contextlib.contextmanager
def _ending_in_order(folder: Path, *, keep: bool) -> Iterator[Path]:
    """Leave no process and no folder behind, however it ends; after a success they may be kept."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    succeeded = False
    try:
        yield folder
        succeeded = True
    finally:
        if not (keep and succeeded):
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            children.end_children(GRACE_S if succeeded else _HURRY_S)
            shutil.rmtree(folder, ignore_errors=True)


def _note(ctx: Context) -> Path:
    """Where a demo that is kept is written down."""
    return ctx.state_dir / "demo.json"


def _free_port() -> int:
    with socket.create_server((_HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _say(text: str) -> None:
    click.secho(f"\n{text}", fg="cyan")
