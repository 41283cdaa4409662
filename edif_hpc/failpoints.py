"""Named places where a test may make a process die, fail or stall.

Crash safety cannot be shown by killing at random alone: the interesting moments are microseconds
wide. So the code names them (`failpoints.hit("store.commit.before")`), and a test arms them with a
spec such as

    store.commit.before=kill@3,relay.send.done.after=raise

which reads: the third time the commit is about to happen, SIGKILL this process; the first time a
DONE has been sent, raise. Actions are `kill` (SIGKILL to self), `stop` (SIGSTOP to self: the process
hangs until someone continues it) and `raise` (`FailpointReached`). Each armed point acts once.

There is no global switch: a process main parses its spec into one `Failpoints` and passes it to the
constructors that need it. Unarmed, a hit is one dictionary lookup. A name has to be listed in
`KNOWN`, so that a misspelt spec is refused instead of testing nothing.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Self, assert_never

from edif_hpc.errors import SettingsError

KNOWN: Final[Mapping[str, str]] = MappingProxyType(
    {
        "store.commit.before": "a group of changes is about to be committed",
        "store.commit.after": "the commit is durable, its callers do not know yet",
        "store.op.after": "one change of a group is made, the group is not committed",
        "store.blob.written": "a large blob is in its temporary file, not yet renamed",
        "store.blob.renamed": "a large blob is durable, its row does not exist",
        "relay.send.grant.before": "a lease is committed, its grant is not sent",
        "relay.send.grant.after": "a grant has been handed to the socket",
        "relay.send.done.before": "a DONE is committed, its acknowledgement is not sent",
        "relay.send.done.after": "the acknowledgement of a DONE has been handed to the socket",
        "launcher.submit.before": "an order is fetched, nothing is submitted",
        "launcher.submit.after": "the scheduler has a job that the relay was not told of",
        "worker.run.before": "a granted request is about to enter an executor",
        "worker.run.after": "an executor has answered, nobody else knows",
        "worker.send.done.before": "an outcome is about to be sent to the relay",
        "worker.send.done.after": "an outcome has been handed to the socket",
    }
)


class FailpointReached(Exception):
    """An armed failpoint with the action `raise` was hit.

    Deliberately no `EdifError`: it stands for the fault that nobody foresaw.
    """


class Action(StrEnum):
    """What an armed failpoint does."""

    KILL = "kill"
    RAISE = "raise"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True, slots=True)
class Armed:
    """One armed point: act on the `nth` hit, counted from 1."""

    action: Action
    nth: int


class Failpoints:
    """The armed points of one process, and how often each was hit."""

    def __init__(self, armed: Mapping[str, Armed] | None = None) -> None:
        self._armed = dict(armed or {})
        self._hits = dict.fromkeys(self._armed, 0)

    @classmethod
    def parse(cls, spec: str) -> Self:
        """Read `name=action[@nth],...`; the empty string arms nothing.

        Raises:
            SettingsError: the syntax, the name or the action is wrong; says what is valid.
        """
        armed: dict[str, Armed] = {}
        for item in filter(None, (part.strip() for part in spec.split(","))):
            name, point = _parse_item(item)
            if name in armed:
                raise SettingsError(f"failpoint {name!r} is armed twice in {spec!r}")
            armed[name] = point
        return cls(armed)

    def hit(self, name: str) -> None:
        """Pass the place called `name`; do what the spec says, if it is armed for this time.

        Raises:
            FailpointReached: the point is armed with `raise`, and this is its nth hit.
        """
        point = self._armed.get(name)
        if point is None:
            return
        self._hits[name] += 1
        if self._hits[name] == point.nth:
            _act(name, point)


def _parse_item(item: str) -> tuple[str, Armed]:
    name, equals, order = item.partition("=")
    action_name, _, nth_text = order.partition("@")
    if not equals:
        raise SettingsError(f"{item!r} is not of the form name=action[@nth]")
    if name not in KNOWN:
        raise SettingsError(f"unknown failpoint {name!r}; known: {', '.join(sorted(KNOWN))}")
    if action_name not in set(Action):
        raise SettingsError(f"unknown action {action_name!r}; known: {', '.join(Action)}")
    if "@" in order and not (nth_text.isascii() and nth_text.isdigit() and int(nth_text) > 0):
        raise SettingsError(f"{nth_text!r} in {item!r} is not a count from 1")
    return name, Armed(action=Action(action_name), nth=int(nth_text or 1))


def _act(name: str, point: Armed) -> None:
    match point.action:
        case Action.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Action.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case Action.RAISE:
            raise FailpointReached(f"failpoint {name!r} was reached for the {point.nth}. time")
        case _:
            assert_never(point.action)
