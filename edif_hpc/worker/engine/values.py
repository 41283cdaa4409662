"""What goes into the engine and what comes out: plain values, known on both sides of every pipe.

The *engine* is the part of a worker that runs researchers' code. It is these kinds of process:

* the **worker** holds sockets and keys and never imports torch; it uses `pool.Engine` and this module;
* the **zygote** holds the imports and the weights, and runs nobody's code;
* the **holder**, where executors share weights on a GPU, has them there, and puts them right after each;
* an **executor** is forked from the zygote, locked up, used for one request, and thrown away.

A `Job` is one attempt at one request, as the engine sees it. Its end is `Saved` (bytes that the client
will load, never opened on this side) or `Failed` (a kind that code branches on, and a message for a
person). The `Level` says how strong the walls around an executor are on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.levels import Level as Level  # part of these values
from edif_hpc.domain.request import FailureKind as FailureKind  # part of these values
from edif_hpc.domain.request import Limits as Limits

MIB = 1024 * 1024

#: A result of at most this many final bytes travels through the socket; a larger one lies in a file.
INLINE_BYTES = MIB
#: An executor tells how far the file has grown after each so many bytes, and not more often.
REPORT_BYTES = 4 * MIB

#: The GPUs, by the names that torch has for them, and the way of weights for which scripts/check-gpu has passed there, such as
#: "NVIDIA RTX A6000, private"; its report is in docs/reference.
VERIFIED_GPUS: frozenset[str] = frozenset()

#: A plain value: what JSON can say. Meta is made of these, so no reader ever has to trust it.
Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """What to load and how to run it; fixed for the life of an engine."""

    #: The client's key, `import.path.Class:{json}`; says the class and the task.
    model_key: str
    #: Tasks to serve beside that of the key, from the same weights.
    more_tasks: tuple[str, ...] = ()
    #: Where the weights come from: a hub repository, or a folder on this machine.
    source: str
    #: A pinned commit or a branch; `None` is the hub's default, or a local folder.
    revision: str | None = None
    #: Adapters that requests may have attached; all are fetched, and each is tried, before the engine is up.
    adapters: tuple[Adapter, ...] = ()
    #: A torch dtype by name, or `auto` for that of the checkpoint.
    dtype: str = "auto"
    #: `cpu`; `cuda` for a GPU, of which each executor then has a copy of the weights; `cpu:0` tries that without one.
    device: str = "cpu"
    #: How many of them the model is cut for.
    devices: int = 1
    #: Which way executors have weights on a device: `private`, `shared`, or `auto` to leave it to us.
    weights: str = "auto"
    #: Variables of the worker's own environment by which a GPU's driver is found and devices are chosen.
    driver: Mapping[str, str] = field(default_factory=dict)
    #: Most that the folder of an executor takes: what the limits of a request never exceed.
    scratch_bytes: int = Limits().scratch_bytes
    #: Compute threads of one executor.
    threads: int = 1
    #: Executors held ready ahead of need.
    ready: int = 2
    #: A folder of the engine's own, on a disk; it is emptied at start.
    scratch: Path
    #: The engine refuses to start below this level.
    floor: Level = Level.FULL
    #: The strongest level to use, for machines where namespaces are against policy.
    ceiling: Level = Level.FULL
    hub_endpoint: str | None = None
    hub_cache: Path | None = None
    hub_token: str | None = None
    #: Folders that requests may read, such as data sets; never written.
    stores: tuple[str, ...] = ()
    #: Folders of Python packages, searched after those that are installed; never written.
    libraries: tuple[str, ...] = ()
    #: URL of the SOCKS proxy through which the hub is reached, if there has to be one.
    proxy: str | None = None
    #: How long loading may take before the engine is given up.
    load_timeout_s: float = 3600.0
    #: How long one executor may take to become ready.
    ready_timeout_s: float = 60.0
    #: How long a killed executor may take to be reaped before the engine counts as broken.
    #: A thousand processes of one request, each with the weights mapped, take half a minute to be gone from two cores.
    reap_timeout_s: float = 120.0

    @property
    def alone(self) -> bool:
        """Whether one executor at a time has a request, because it has all of the device."""
        return self.device != "cpu"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One attempt at one request."""

    request_id: str
    attempt: int
    #: The client's blob, or the file that holds it.
    blob: bytes | Path
    #: Whether the blob is compressed, and so whether the result must be.
    compress: bool
    #: The client's per-request settings of the model; checked against an allow-list.
    env: Mapping[str, Plain] = field(default_factory=dict)
    #: The key that the client named, echoed in meta; the task in it decides the model. Empty: the first one.
    model_key: str = ""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """The job ended well: exactly one of `inline` and `file` holds the client's bytes.

    The file lies in the engine's scratch; whoever receives this value deletes it when done.
    """

    inline: bytes | None
    file: Path | None
    size: int
    meta: dict[str, Plain]


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The job has no result. `message` is for the researcher and shown as it stands."""

    kind: FailureKind
    message: str
    meta: dict[str, Plain]


Outcome = Saved | Failed


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far loading is: a stage by name, and bytes where they are known."""

    stage: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class Isolation:
    """The level reached, the steps that make it, and why a stronger one was not to be had."""

    level: Level
    #: What an executor goes through before it is ready, in order.
    steps: tuple[str, ...]
    #: What could not be done here, with the error that was seen.
    missing: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineInfo:
    """What is loaded and how it is kept; goes to the relay, to `/env` and to `ps`."""

    #: The commit that was loaded; a folder's is taken from its contents.
    commit: str | None
    dtype: str
    #: The class of the model behind each task, the first one first.
    tasks: dict[str, str]
    #: Names that requests may refer to instead of carrying, besides the modules.
    persistent: tuple[str, ...]
    attn_implementation: str | None
    python_version: str
    #: Versions by import name, as nnsight's `compare()` wants them.
    packages: dict[str, str]
    isolation: Isolation
    weights_bytes: int
    load_s: float
    device: str = "cpu"
    #: What its driver calls it; empty for the CPU.
    device_name: str = ""
    #: How executors have the weights: `mapped` on the CPU, else `private` or `shared`.
    weights: str = "mapped"
    #: The commit of each adapter that requests may have attached.
    adapters: dict[str, str] = field(default_factory=dict)
    #: By task: what the checkpoint has no weights for, so that its numbers are random. Tasks that lack nothing are not here.
    random_weights: dict[str, list[str]] = field(default_factory=dict)
    #: Folders that requests may read, and those of more Python packages.
    stores: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)

    @property
    def unverified(self) -> bool:
        """Whether what is promised has not been tried on this kind of device."""
        return self.device != "cpu" and f"{self.device_name}, {self.weights}" not in VERIFIED_GPUS
