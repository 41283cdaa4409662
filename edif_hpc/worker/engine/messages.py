"""The messages between worker, zygote and executors, each with exactly typed fields.

Who says what: fetch says `Loading` and `Fetched`; the worker sends `Load` and `Fork` to the zygote, `Run` to an executor; the zygote
answers with `Loading`, then `Loaded` or `Refused`, then `Forked` and `Exited` as executors come and
go; an executor says `Ready`, any number of `Log` and `Written`, and ends with `Done` or `Broken`.

The annotations are the contract: `protocol.decode` checks every field of a frame against them, so a
type used here needs a check there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from edif_hpc.worker.engine.values import Plain


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

    With `rehearse` it runs the self-test before it is ready. The rest is what the first one found on the device, if there is
    one: how many bytes were free (0: this is the first), and the tasks whose numbers want gradients tracked.
    """

    executor: int
    rehearse: bool
    free_bytes: int = 0
    graded: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Forked:
    """Zygote to worker: it runs. Beside it: a descriptor that stands for the process."""

    executor: int
    pid: int


@dataclass(frozen=True, kw_only=True)
class Exited:
    """Zygote to worker: it was reaped, with this wait status and this much used."""

    executor: int
    status: int
    cpu_s: float
    peak_rss_bytes: int


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Executor to worker: locked up, warm, waiting. `steps` is what confined it, in order; the rest is of its device."""

    steps: list[str]
    device_name: str = ""
    free_bytes: int = 0
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
    memory_bytes: int
    result_bytes: int
    log_bytes: int
    log_lines: int


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


Message = (
    Load | Loading | Loaded | Refused | Fetched | Fork | Forked | Exited | Ready | Run | Log | Written
    | Done | Broken
)  # fmt: skip
FROM_ZYGOTE = (Loading, Loaded, Refused, Forked, Exited)
FROM_FETCH = (Loading, Fetched, Refused)
FROM_EXECUTOR = (Ready, Refused, Log, Written, Done, Broken)
TO_ZYGOTE = (Load, Fork)
TO_EXECUTOR = (Run,)


def descriptors(message: Message) -> int:
    """Return how many descriptors travel beside `message`."""
    match message:
        case Fork():
            return 2
        case Forked():
            return 1
        case Run(blob=None):
            return 1
        case _:
            return 0
