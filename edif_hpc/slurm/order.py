"""Orders: the 0600 files by which one process tells the next what to do, so that no secret is in an argv or environment.

`PilotOrder` goes from whoever submits (the command line, later the launcher) to the pilot; `WorkerOrder` from the pilot to
the worker. Both are JSON with checked fields. What comes back is an exit code, `WorkerExit`.
"""

from __future__ import annotations

import os
from enum import IntEnum
from pathlib import Path

import msgspec

from edif_hpc.errors import SettingsError


class WorkerExit(IntEnum):
    """Why a worker ended, for its pilot. Any other code is a fault that starting again may mend."""

    DRAINED = 0
    REFUSED = 3  #: the relay does not serve this peer; starting again does not help
    ENGINE_FAILED = 4  #: the model could not be loaded, or the isolation is too weak
    ENGINE_DIED = 5  #: the zygote died; start again


class EngineFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a site says about running engines: where models come from, and how much to use."""

    hub_endpoint: str | None = None
    hub_cache: str | None = None
    hub_token: str | None = None
    threads: int = 0  #: compute threads of one executor; 0 takes torch's own choice, the cores of this process
    ready: int = 2  #: executors held ready ahead of need
    isolation_ceiling: str = "full"  #: the strongest level to try
    log_level: str = "info"
    failpoints: str = ""


class PilotOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a pilot is to do."""

    name: str
    relay_url: str
    join_token: str
    scratch: str
    engine: EngineFacts = EngineFacts()
    worker_module: str = "edif_hpc.worker.app"  #: what the pilot runs as its worker


class WorkerOrder(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker is to do."""

    name: str
    endpoint: str
    server_key: str
    public_key: str
    secret_key: str
    scratch: str
    engine: EngineFacts = EngineFacts()


def write_order(path: Path, order: msgspec.Struct) -> None:
    """Write an order for its owner alone."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)  # of a file that was there before, too
        file.write(msgspec.json.encode(order))


def read_pilot_order(path: Path) -> PilotOrder:
    """Read what `write_order` wrote; refuses a file that others may read."""
    return msgspec.json.decode(_private(path), type=PilotOrder)


def read_worker_order(path: Path) -> WorkerOrder:
    """Read what `write_order` wrote; refuses a file that others may read."""
    return msgspec.json.decode(_private(path), type=WorkerOrder)


def _private(path: Path) -> bytes:
    if path.stat().st_mode & 0o077:
        raise SettingsError(f"{path} holds secrets and others may read it; chmod 600 {path}")
    return path.read_bytes()
