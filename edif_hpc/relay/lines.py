"""The one line that tells what happens to a request: facts in, words out.

nnsight's display writes it behind id, status and elapsed time, over itself, in one row of the terminal. So a line is short,
says first what happens, then how far it is and how long it takes, and names nobody but the reader: others are counted.
What is not known is said to be unknown. All functions are pure; `outlook` gathers the facts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from edif_hpc.domain.lease import LeaseEnd

_STAGES: Mapping[str, str] = MappingProxyType(
    {
        "": "the worker loads the model",
        "fetching": "the worker fetches the model",
        "importing": "the worker imports its libraries",
        "loading": "the worker loads the model",
        "placing": "the worker places the weights",
        "self-test": "the worker tests itself",
    }
)

_ENDS: Mapping[str, str] = MappingProxyType(
    {
        LeaseEnd.STOLEN: "taken back for an idle worker",
        LeaseEnd.DRAINED: "{worker} had to leave",
        LeaseEnd.RELEASED: "{worker} gave it back",
        LeaseEnd.PREEMPTED: "the scheduler took the node of {worker}",
        LeaseEnd.WALLTIME: "the time of {worker} was over",
        LeaseEnd.EXPIRED: "{worker} was silent until its lease ended",
        LeaseEnd.EXECUTOR_CRASH: "its process died",
        LeaseEnd.OOM: "its process ran out of memory",
        LeaseEnd.WORKER_LOST: "{worker} was lost",
        LeaseEnd.UNKNOWN: "the cause is unknown",
    }
)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """What a queued request waits behind: requests that run or wait before it, and whose they are."""

    place: int = 1  #: in the queue, from 1
    requests: int = 0
    people: int = 0
    mine: int = 0  #: how many of them are the reader's own
    start_s: float | None = None  #: until it is expected to start; None if unknown
    paused_s: float = 0.0  #: until a worker that gave leases back is granted one again


@dataclass(frozen=True, kw_only=True)
class Load:
    """How far a worker is with its model; `done` of `total` bytes where they are known."""

    stage: str = ""
    done: int = 0
    total: int = 0
    for_s: float = 0.0
    last_s: float | None = None  #: what the deployment's last load took in all


@dataclass(frozen=True, kw_only=True)
class Held:
    """A request that a worker has. `silent_s` is since the worker was heard, None if it is not connected."""

    place: str  #: the worker, or "" if it is not known
    for_s: float | None = None  #: since it was granted, or since it began
    wall_s: float | None = None  #: its limit
    begun: bool = False
    attempt: int = 1
    again: str = ""  #: how the attempt before ended, in words
    sent: int = 0  #: bytes of the result that the store has
    size: int = 0  #: of the result; 0 while that is not known
    silent_s: float | None = 0.0
    lease_left_s: float | None = None


def queued(ahead: Ahead, again: str = "") -> str:
    """It waits for a worker that serves."""
    place = "next" if ahead.place <= 1 else f"place {ahead.place}"
    if ahead.requests == 0 and ahead.paused_s:
        line = f"{place}; the worker gave requests back and pauses for {duration(ahead.paused_s)}"
    elif ahead.requests == 0:
        line = f"{place}; a worker takes it now"
    elif ahead.start_s is None:
        line = f"{place}, behind {counted(ahead)}; start unknown, no run has ended yet"
    else:
        line = f"{place}, about {duration(max(1.0, ahead.start_s))} ahead of you: {counted(ahead)}"
    return line + _retold(again)


def provisioning(why: str, ahead: Ahead, again: str = "") -> str:
    """It waits for its deployment."""
    behind = f"; {counted(ahead)} ahead of you" if ahead.requests else ""
    return why + behind + _retold(again)


def counted(ahead: Ahead) -> str:
    """Who is ahead, in numbers alone."""
    requests = _plural(ahead.requests, "request")
    if ahead.mine == ahead.requests:
        return f"{requests} of yours"
    return f"{requests} of {_plural(ahead.people, 'person', 'people')}"


def nothing(deployment: str, *, leaving: bool = False) -> str:
    """No allocation serves a deployment."""
    why = "the last worker leaves" if leaving else "no worker is ordered"
    return f"{why}; an operator starts one: edif-hpc up {deployment}"


def pending(
    *, job: str | None, for_s: float, why: str = "", start_in_s: float | None = None
) -> str:
    """An allocation was ordered, and has not started; `why` and `start_in_s` are the scheduler's words."""
    if job is None:
        return f"the worker is ordered, its job is not submitted yet, {duration(for_s)}"
    reason = f" ({why})" if why else ""
    soon = "" if start_in_s is None else f", may start in about {duration(start_in_s)}"
    return f"the worker waits for a node: job {job} is queued for {duration(for_s)}{reason}{soon}"


def starting(*, node: str | None) -> str:
    """An allocation runs, and its worker has not spoken yet."""
    return f"the worker starts on {node}" if node else "the worker starts"


def failing() -> str:
    """A worker could not load its model. Why is the operator's business: it may hold paths of the cluster."""
    return "the worker could not load the model; the operator sees why: edif-hpc ps"


def loading(load: Load) -> str:
    """A worker prepares."""
    line = _STAGES.get(load.stage, f"the worker prepares ({load.stage})")
    if load.total:
        line += f": {progress(load.done, load.total)}"
    last = "" if load.last_s is None else f" of about {duration(max(load.last_s, load.for_s))}"
    return f"{line}, {duration(load.for_s)}{last}"


def held(facts: Held) -> str:
    """A worker has it."""
    if facts.silent_s is None or facts.silent_s > 0:
        return _silent(facts)
    number = f"; attempt {facts.attempt}" if facts.attempt > 1 else ""
    again = f"{number} ({facts.again})" if number and facts.again else number
    return _stage(facts) + again


def _stage(facts: Held) -> str:
    for_s = "" if facts.for_s is None else duration(facts.for_s)
    if facts.size:
        stored = facts.sent >= facts.size
        how = f"{size(facts.size)}, is stored" if stored else progress(facts.sent, facts.size)
        return f"it has run; its result goes up: {how}"
    if not facts.begun:
        return f"sent to {facts.place}, waits for its turn there{for_s and ', ' + for_s}"
    left = None
    if facts.wall_s is not None and facts.for_s is not None:
        left = max(0.0, facts.wall_s - facts.for_s)
    most = "" if left is None else f", at most {duration(left)} more"
    return f"runs on {facts.place}{for_s and ' for ' + for_s}{most}"


def _silent(facts: Held) -> str:
    left = duration(facts.lease_left_s or 0.0)
    if facts.silent_s is None:
        return f"its worker is not connected; its lease ends in {left}, then it runs elsewhere"
    heard = duration(facts.silent_s)
    return f"the worker has not been heard for {heard}; its lease ends in {left}, then it runs elsewhere"


def ended(end: str | None, *, node: str = "", cause: str = "") -> str:
    """How an attempt ended, in words; "" while it goes on."""
    if end is None:
        return ""
    worker = f"the worker on {node}" if node else "the worker"
    words = _ENDS.get(end, end).format(worker=worker)
    return f"{words}: {cause}" if cause and cause != end else words


def _retold(again: str) -> str:
    return f"; it runs again ({again})" if again else ""


def duration(seconds: float) -> str:
    """A length of time, short and never rounded to nothing."""
    whole = int(seconds + 0.5)
    if whole < 120:
        return f"{whole} s"
    minutes, secs = divmod(whole, 60)
    if minutes < 10 and secs:
        return f"{minutes} min {secs} s"
    hours, minutes = divmod(minutes, 60)
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def size(size_bytes: float) -> str:
    """A number of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.2f} GiB"


def progress(done: int, total: int) -> str:
    """So much of so much."""
    return f"{size(min(done, total))} of {size(total)} ({min(1.0, done / total):.0%})"


def _plural(count: int, one: str, many: str = "") -> str:
    return f"{count} {one if count == 1 else many or one + 's'}"
