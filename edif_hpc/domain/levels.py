"""How strongly a request is walled in, and what it may do at each level.

A level is a promise with a name. A worker finds out at its start, by trying, which one its machine can keep, and says so; a
deployment names the floor below which it is not served. The walls are the engine's (`worker.engine.jail`). This module has
what people are told about them: `RULES` is the one table from which `edif-hpc env`, the errors of requests and the page
for operators (docs/howto/read-a-level.md) take their words.

Python itself is never restricted: any library may be imported, at every level. What differs is what the operating system
lets the process do. What a level leaves open (`Verdict.OPEN`) depends on the account that workers run as, and on the kernel:
below `no-namespaces` system calls are still filtered where the kernel can, but nothing is promised of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Level(StrEnum):
    """How strongly an executor is walled in, strongest first; each is probed by trying it."""

    #: Own user, mount, network, IPC and PID namespaces, Landlock, seccomp, limits.
    FULL = "full"
    #: Landlock, seccomp (threads but no processes) and limits.
    NO_NAMESPACES = "no-namespaces"
    #: A process of its own with limits. For people who may trust each other.
    PROCESS = "process"

    def reaches(self, floor: Level) -> bool:
        """Whether this level is at least as strong as `floor`."""
        order = list(Level)
        return order.index(self) <= order.index(floor)


class Verdict(StrEnum):
    """What becomes of an attempt."""

    YES = "yes"
    NO = "no"
    OPEN = "open"  #: the level does not keep anybody from it


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that a request may want to do, and what becomes of it at each level."""

    name: str
    what: str
    verdicts: Mapping[Level, Verdict]
    note: str = ""  #: what holds wherever it is allowed
    instead: str = ""  #: what to do where it is not

    def told(self, level: Level) -> str:
        """What a reader is told beyond the verdict."""
        verdict = self.verdicts[level]
        if verdict is Verdict.OPEN:
            return _ACCOUNT
        return self.note if verdict is Verdict.YES else self.instead


#: Of what the level `process` leaves open.
_ACCOUNT: Final = "whatever the worker's account may"
#: All that the levels have in common; of the weakest one only what is tried and held is promised.
_ALWAYS: Final = dict.fromkeys(Level, Verdict.YES)
_NEVER: Final = dict.fromkeys(Level, Verdict.NO)
_WALLED: Final = {**_NEVER, Level.PROCESS: Verdict.OPEN}

RULES: Final[tuple[Rule, ...]] = (
    Rule(name="import", what="import whatever the image or a library has", verdicts=_ALWAYS),
    Rule(name="threads", what="start threads", verdicts=_ALWAYS),
    Rule(
        name="processes",
        what="start processes (subprocess, multiprocessing, joblib's, workers of a DataLoader)",
        verdicts={**_WALLED, Level.FULL: Verdict.YES},
        note="they end with the request",
        instead="use threads; joblib runs its jobs one after the other",
    ),
    Rule(
        name="network",
        what="use the network, or sockets of any other kind (managers of multiprocessing, num_proc of datasets)",
        verdicts=_WALLED,
        instead="read from a store, send data along with the request, leave num_proc out",
    ),
    Rule(name="stores", what="read the stores", verdicts=_ALWAYS),
    Rule(
        name="read",
        what="read other files: folders of others, results, keys, homes",
        verdicts=_WALLED,
    ),
    Rule(
        name="scratch",
        what="write into a folder of its own (HOME, TMPDIR and the working folder)",
        verdicts=_ALWAYS,
        note="as much as the limit of temporary files allows; it is gone with the request",
    ),
    Rule(
        name="write",
        what="write anywhere else, also into stores and libraries",
        verdicts=_WALLED,
    ),
    Rule(name="others", what="see, signal or trace other processes", verdicts=_WALLED),
    Rule(
        name="kernel",
        what="make mounts and namespaces, use BPF, io_uring, performance counters or the kernel's keys",
        verdicts=_WALLED,
    ),
    Rule(
        name="devices",
        what="use devices other than the GPUs that the deployment has",
        verdicts=_WALLED,
    ),
    Rule(
        name="weights",
        what="change the weights",
        verdicts=_ALWAYS,
        note="for itself alone; it is undone with the request",
    ),
    Rule(
        name="limits",
        what="take more time, memory, disk or output than its limits say",
        verdicts=_NEVER,
        instead="it ends with an error that names the limit",
    ),
)


def rule(name: str) -> Rule:
    """The rule of that name."""
    return {each.name: each for each in RULES}[name]


def told(level: Level) -> list[dict[str, str]]:
    """The rules at one level, for programs."""
    return [
        {
            "name": each.name,
            "what": each.what,
            "verdict": str(each.verdicts[level]),
            "note": each.told(level),
        }
        for each in RULES
    ]


def table() -> str:
    """The whole table, in Markdown."""
    head = ["a request may", *(f"`{level}`" for level in Level), "remark"]
    rows = [head, ["---"] * len(head)]
    rows += [
        [each.what, *(str(each.verdicts[level]) for level in Level), each.note or each.instead]
        for each in RULES
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
