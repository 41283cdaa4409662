"""The messages between worker, zygote and executors, each with exactly typed fields.

Who says what: fetch says `Loading` and `Fetched`; the worker sends `Load` and `Fork` to the zygote, `Run` to an executor; the zygote
answers with `Loading`, then `Loaded` or `Refused`, then `Forked` and `Exited` as executors come and
go; an executor says `Ready`, any number of `Log` and `Written`, and ends with `Done` or `Broken`.

The annotations are the contract: `protocol.decode` checks every field of a frame against them, so a
type used here needs a check there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edif_hpc.worker.engine.values import Limits, Plain


@dataclass(frozen=True, kw_only=True)
class Load:
    """Worker to zygote, once: what to load, from a folder on this machine."""

    model_key: str
    more_tasks: list[str]
    folder: str
    commit: str | None
    adapters: dict[str, str]
    dtype: str
    device: str
    threads: int
    scratch: str
    ceiling: str
    floor: str
    #: What an executor sets before it starts the driver of a device.
    driver: dict[str, str] = field(default_factory=dict)
    #: How many of them, and which way executors have weights there.
    devices: int = 1
    weights: str = "auto"
    #: Folders that executors may read, and those of more Python packages.
    stores: list[str] = field(default_factory=list)
    libraries: list[str] = field(default_factory=list)
    #: Most that an executor's folder takes.
    scratch_bytes: int = Limits().scratch_bytes


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Zygote to worker: how far loading is."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Zygote to worker, once: the weights are in place. `selftests` has a blob to try each task with, by model key."""

    info: dict[str, Plain]
    selftests: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Zygote, fetch or an executor that is not ready to worker: it cannot serve; `code` is that of an error class."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """Fetch to worker, once: the files are here, and of which commit they are.

    `adapters` has a folder for each adapter, by its name; like any folder of a hub's cache it is
    called by its commit.
    """

    folder: str
    commit: str | None
    adapters: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Fork:
    """Worker to zygote: fork an executor. Beside it: its socket, and the file for its result.

    With `rehearse` it runs the self-test before it is ready. The rest is what the first one found on its devices, if there
    are any: how many bytes were free on each (none: this is the first), and the tasks whose numbers want gradients tracked.
    """

    executor: int
    rehearse: bool
    free_bytes: list[int] = field(default_factory=list)
    graded: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Forked:
    """Zygote to worker: it runs. Beside it: a descriptor that stands for the process."""

    executor: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class Exited:
    """Zygote to worker: it was reaped, with this wait status and this much used; shared weights are as they were.

    So many of them it had changed, and putting that right took so long.
    """

    executor: int
    status: int
    cpu_s: float
    peak_rss_bytes: int
    restored: int = 0
    restore_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Executor to worker: locked up, warm, waiting. `steps` is what confined it, in order; the rest is of its device."""

    steps: list[str]
    #: CPU time until then, which no request is charged for.
    cpu_s: float = 0.0
    #: Memory until then, likewise.
    private_bytes: int = 0
    mapped_bytes: int = 0
    shared_bytes: int = 0
    device_name: str = ""
    free_bytes: list[int] = field(default_factory=list)
    graded: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Run:
    """Worker to executor: the request. A blob that is not in the frame lies in a file beside it."""

    blob: bytes | None
    compress: bool
    env: dict[str, Plain]
    model_key: str
    #: What all random generators begin from.
    seed: int
    #: Track gradients even if the request does not speak of them.
    gradients: bool
    #: What it may use: the numbers of `Limits`, and who set each (`limits_of` puts them together).
    limits: dict[str, float]
    limit_sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Log:
    """Executor to worker: lines that the researcher's code printed."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Written:
    """Executor to worker: so many bytes of the result are in the file, for good."""

    size: int


@dataclass(frozen=True, kw_only=True)
class Done:
    """Executor to worker, at most once: the result, here or in the file."""

    inline: bytes | None
    size: int
    meta: dict[str, Plain]


@dataclass(frozen=True, kw_only=True)
class Broken:
    """Executor to worker, at most once: why there is no result."""

    kind: str
    message: str
    #: It failed because no gradients were tracked.
    lacked_gradients: bool
    meta: dict[str, Plain]


@dataclass(frozen=True, kw_only=True)
class Hold:
    """Zygote to holder, once: what to have on which devices. Beside it: the memory files that it comes from.

    The last of these are the arenas themselves where a file stands in for a device. `regions` is where each storage lies, as
    `arena.pack` writes it.
    """

    device: str
    devices: int
    files: int
    arenas: int
    regions: bytes
    readable: list[str]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Holder to zygote, once: it is there. `handles` has what opens it on each GPU."""

    device_name: str
    handles: dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Settle:
    """Zygote to holder: an executor is gone; on each device so many bytes have to be free again (none: not known yet)."""

    free_bytes: list[int]


@dataclass(frozen=True, kw_only=True)
class Settled:
    """Holder to zygote: the weights are as they were taken; so many of them had been changed, and it took so long."""

    restored: int = 0
    seconds: float = 0.0


Message = (
    Load | Loading | Loaded | Refused | Fetched | Fork | Forked | Exited | Ready | Run | Log | Written
    | Done | Broken | Hold | Held | Settle | Settled
)  # fmt: skip
FROM_ZYGOTE = (Loading, Loaded, Refused, Forked, Exited)
FROM_FETCH = (Loading, Fetched, Refused)
FROM_EXECUTOR = (Ready, Refused, Log, Written, Done, Broken)
TO_ZYGOTE = (Load, Fork)
TO_EXECUTOR = (Run,)
TO_HOLDER = (Hold, Settle)
FROM_HOLDER = (Held, Settled, Refused)


def descriptors(message: Message) -> int:
    """Return how many descriptors travel beside `message`."""
    match message:
        case Fork():
            return 2
        case Forked():
            return 1
        case Run(blob=None):
            return 1
        case Hold(files=count):
            return count
        case _:
            return 0
