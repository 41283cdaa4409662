"""Orders: the 0600 files by which one process tells the next what to do, so that no secret is in an argv or environment.

`PilotOrder` goes from whoever submits (the command line, the launcher, another pilot) to the pilot; `WorkerOrder` from the pilot to
the worker. Both are JSON with checked fields. What comes back is an exit code, `WorkerExit`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Final, Literal

import msgspec

from edif_hpc.errors import SettingsError

Vendor = Literal["nvidia", "amd", "none"]
RouteKind = Literal["direct", "socks", "connect", "login"]
#: The worker that serves models; tests have others.
WORKER: Final = "edif_hpc.worker.app"
REACH: Final = "edif_hpc.worker.reach"  #: tells which level of isolation a worker reaches
SERVED: Final = (
    "served"  #: a file in the worker's scratch: how many requests it ran, when it ends in order
)


class WorkerExit(IntEnum):
    """Why a worker ended, for its pilot. Any other code is a fault that starting again may mend."""

    DRAINED = 0
    REFUSED = 3  #: the relay does not serve this peer; starting again does not help
    ENGINE_FAILED = 4  #: the model could not be loaded
    ENGINE_DIED = 5  #: the zygote died; start again
    TOO_WEAK = 6  #: the isolation that is to be had here is below the deployment's floor; starting again does not help


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """What `edif_hpc.worker.reach` says of a machine."""

    level: str  #: the strongest level of isolation that holds
    missing: tuple[str, ...]  #: what stronger ones failed on


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a site says about running engines: where models come from, and how much to use."""

    hub_endpoint: str | None = None
    hub_cache: str | None = None
    hub_token: str | None = None
    threads: int = 0  #: compute threads of one executor; 0 takes torch's own choice, the cores of this process
    ready: int = 2  #: executors held ready ahead of need
    isolation_ceiling: str = "full"  #: the strongest level to try
    stores: tuple[
        str, ...
    ] = ()  #: folders that requests may read, such as data sets; never written
    libraries: tuple[
        str, ...
    ] = ()  #: folders of Python packages, searched after the installed ones; never written
    log_level: str = "info"
    failpoints: str = ""

    @property
    def readable(self) -> tuple[str, ...]:
        """All folders that requests are let into."""
        return self.stores + self.libraries


class ContainerOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The image that the worker runs in, and how; what a site's `Container` says, and what it takes from elsewhere."""

    image: str  #: path of a SIF that this node can read
    sha256: str | None = None  #: what it must hash to; without it anything at that path is run
    apptainer: str = "apptainer"
    vendor: Vendor = "none"  #: whose GPUs are let in
    binds: tuple[str, ...] = ()  #: more folders, as `--bind` wants them
    env: Mapping[
        str, str
    ] = {}  #: more variables inside; no secrets, they are shown to whoever may look
    copies: str = ""  #: a folder of the node, ours alone, for copies of images (may hold $VARS); "" is in the scratch
    python: str = "/opt/edif-hpc/bin/python"  #: the image's interpreter


class Route(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a compute node gets out."""

    kind: RouteKind = "direct"
    proxy: str = ""  #: HOST:PORT
    forward_file: str = ""  #: where the forwarder of a login node says where it is


FORWARD_USER: Final = "edif"  #: the name that goes with the forwarder's secret


class ForwardFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the forwarder of a login node is, and what it wants to hear."""

    address: str  #: HOST:PORT
    secret: str


class PilotOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a pilot is to do."""

    name: str
    relay_url: str
    join_token: str
    scratch: str
    engine: EngineFacts = EngineFacts()
    route: Route = Route()
    join_s: float = 120.0  #: how long the relay may be away when the pilot wants to join
    worker_module: str = WORKER  #: what the pilot runs as its worker
    container: ContainerOrder | None = (
        None  #: without one the worker runs on the host, by the pilot's own Python
    )
    #: of this allocation, for what is to be found later (`exit.json`); empty takes the scratch, and keeps it
    folder: str = ""
    term_s: float = 20.0  #: how long it may take to leave after SIGTERM
    site_file: str = ""  #: the site's facts, to submit a successor by; empty if others do that


class WorkerOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is to do."""

    name: str
    endpoint: str
    server_key: str
    public_key: str
    secret_key: str
    scratch: str
    engine: EngineFacts = EngineFacts()
    proxy: str | None = None  #: URL of a SOCKS proxy for HTTP, where nodes need one


def write_order(path: Path, order: msgspec.Struct) -> None:
    """Write an order for its owner alone."""
    write_private(path, msgspec.json.encode(order))


def write_private(path: Path, content: bytes) -> None:
    """Write a file that only its owner may read."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)  # of a file that was there before, too
        file.write(content)


def read_pilot_order(path: Path) -> PilotOrder:
    """Read what `write_order` wrote; refuses a file that others may read."""
    return msgspec.json.decode(_private(path), type=PilotOrder)


def read_worker_order(path: Path) -> WorkerOrder:
    """Read what `write_order` wrote; refuses a file that others may read."""
    return msgspec.json.decode(_private(path), type=WorkerOrder)


def write_forward(path: Path, told: ForwardFile) -> None:
    """Say it to pilots that may be reading at this moment."""
    new = path.with_suffix(".new")
    write_order(new, told)
    new.replace(path)


def read_forward(path: Path) -> ForwardFile:
    """Read what `write_forward` wrote; refuses a file that others may read."""
    return msgspec.json.decode(_private(path), type=ForwardFile)


def _private(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise SettingsError(f"{path} holds secrets and others may read it; chmod 600 {path}")
    return path.read_bytes()
