"""The worker's end of the wire protocol as a state machine without I/O.

Events in (a message came, an executor began, time passed), `actions` out (send this, run that, kill
it, reconnect, leave). It owns the leases and what must be repeated: a `Done` until it is
acknowledged, a `Hello` until it is welcomed. `worker.runtime` carries the actions out.

    GREETING ──Welcome──► OPEN ──drain──► DRAINING ──nothing held──► LEFT
        ▲───── silence, Refused(unknown_session) ─────┘

A lease that is given back while no connection stands is still presented in `Hello`, and returned
after the Welcome: so the relay hears why it ended, and not only that it is gone.

Time is an argument, in monotonic seconds. The relay's end is `turns`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from edif_hpc.domain.lease import HEARTBEAT_S, LeaseEnd
from edif_hpc.wire import messages as m
from edif_hpc.wire.actions import (
    Action,
    Draining,
    Fatal,
    Kill,
    Leave,
    Reconnect,
    Run,
    Send,
    Settled,
    UploadAgain,
    Urls,
    Welcomed,
)
from edif_hpc.wire.turns import UNKNOWN_SESSION

SILENCE_BEATS = 4
_WORD = 200  # characters that a short text of the protocol may have


class Link(StrEnum):
    """The state of a worker's session."""

    GREETING = "greeting"
    OPEN = "open"
    DRAINING = "draining"
    LEFT = "left"


@dataclass(kw_only=True)
class _Lease:
    grant: m.Grant
    started: bool = False
    done: m.Done | None = None
    done_at: float = 0.0
    killing: bool = False
    sent: int = 0
    size: int = 0


@dataclass(kw_only=True)
class WorkerSession:
    """The worker's end. Every method returns the actions to carry out, in order."""

    nonce: str
    window: int
    executors: int
    state: str = "loading"
    facts: dict[str, Any] = field(default_factory=dict)
    link: Link = Link.GREETING
    heartbeat_s: float = HEARTBEAT_S
    _leases: dict[str, _Lease] = field(default_factory=dict)
    _owed: list[tuple[m.Held, m.Return]] = field(default_factory=list)
    _heard_at: float = 0.0
    _sent_at: float = 0.0
    _drain: str | None = None
    _told: m.State | None = None
    _on: Mapping[type[m.Message], Callable[[Any], list[Action]]] = field(init=False)

    def __post_init__(self) -> None:
        self._on = {
            m.Welcome: self._welcome,
            m.Refused: self._refused,
            m.Grant: self._grant,
            m.Parts: lambda parts: [Urls(parts=parts)],
            m.Ack: self._ack,
            m.Reupload: self._reupload,
            m.Abandon: self._abandon,
            m.Cancel: self._cancel,
            m.Steal: self._steal,
            m.Drain: lambda order: self.drain(order.reason),
            m.Order: lambda _: [],  # a pilot's affair
            m.Beat: lambda _: [],
        }

    # -- events from the runtime

    def connected(self, now: float) -> list[Action]:
        """A (new) connection is up: greet, and re-present what is held."""
        self.link = Link.GREETING
        self._heard_at = now
        return self._greet(now)

    def changed(
        self,
        state: str,
        *,
        detail: str = "",
        progress: float | None = None,
        facts: dict[str, Any] | None = None,
        done: int = 0,
        total: int = 0,
    ) -> list[Action]:
        """The worker's own state changed, or how far its load is; a warm worker says how much it takes."""
        if self._drain is not None:
            return []  # it stays "draining", whatever becomes of its model
        self.state = state
        self.facts = facts if facts is not None else self.facts
        told = m.State(
            state=state,
            detail=detail[:_WORD],
            progress=progress,
            done=done,
            total=total,
            facts=facts or {},
        )
        return self._tell_state(told)

    def warm(self, *, executors: int, facts: dict[str, Any]) -> list[Action]:
        """The model is loaded: serve, with one lease more than executors, so that none idles for a round trip."""
        if self._drain is None:
            self.window, self.executors = executors + 1, executors
        return self.changed("warm", detail="serves", facts=facts)

    def began(self, request: str, attempt: int) -> list[Action]:
        """An executor was given the request; from now on it cannot be stolen."""
        lease = self._mine(request, attempt)
        if lease is None:
            return []
        lease.started = True
        return [Send(message=m.Started(request=request, attempt=attempt))] if self._talking else []

    def uploading(self, request: str, attempt: int, *, sent: int, size: int) -> None:
        """So much of a result is in the store; the next heartbeat says so."""
        lease = self._mine(request, attempt)
        if lease is not None:
            lease.sent, lease.size = sent, size

    def finished(self, done: m.Done, now: float) -> list[Action]:
        """An attempt ended; its `Done` is kept until the relay answers."""
        lease = self._mine(done.request, done.attempt)
        if lease is None:
            return [Settled(request=done.request, attempt=done.attempt)]
        lease.done, lease.done_at = done, now
        return [Send(message=done)] if self._talking else []

    def killed(self, request: str, attempt: int) -> list[Action]:
        """An executor that `Kill` named is gone."""
        return self.returned(request, attempt, LeaseEnd.RELEASED, {})

    def returned(
        self, request: str, attempt: int, end: LeaseEnd, evidence: Mapping[str, str]
    ) -> list[Action]:
        """An attempt ended without an answer: the relay decides whether it runs again."""
        lease = self._mine(request, attempt)
        if lease is None:
            return []
        return [*self._give_back(request, lease, end, evidence), *self._maybe_leave()]

    def drain(self, reason: str) -> list[Action]:
        """Take no more leases: give back what has not started, finish the rest, leave."""
        if self._drain is not None:
            return []
        self._drain = reason[:_WORD]
        self.state, self.window = "draining", 0
        out: list[Action] = [Draining(reason=self._drain)]
        if self._talking:
            self.link = Link.DRAINING
            out += self._tell_state(m.State(state=self.state, detail=self._drain))
        for request, lease in list(self._leases.items()):
            if not lease.started and lease.done is None:
                out += self._take_off(request, lease, "drained", LeaseEnd.DRAINED)
        return out + self._maybe_leave()

    def cut_short(self, reason: str, end: LeaseEnd) -> list[Action]:
        """There is no time left: give back what runs as well. A result that waits for its answer is kept to the last."""
        out = self.drain(reason)
        for request, lease in list(self._leases.items()):
            if lease.done is None:
                out += self._take_off(request, lease, reason, end)
        return out + self._maybe_leave()

    def tick(self, now: float) -> list[Action]:
        """Time passed: beat, repeat what is unanswered, notice silence."""
        if self.link is Link.LEFT:
            return []
        if now - self._heard_at > SILENCE_BEATS * self.heartbeat_s:
            silent = now - self._heard_at
            self._heard_at = now
            return [Reconnect(silent_s=silent)]
        if now - self._sent_at < self.heartbeat_s:
            return []
        if self.link is Link.GREETING:
            return self._greet(now)
        self._sent_at = now
        unanswered = [
            Send(message=each.done)
            for each in self._leases.values()
            if each.done is not None and now - each.done_at > self.heartbeat_s
        ]
        return [Send(message=m.Renew(held=self._held())), *unanswered]

    def received(self, message: m.FromRelay, now: float) -> list[Action]:
        """One message of the relay."""
        if self.link is Link.LEFT:
            return []
        self._heard_at = now
        return self._on[type(message)](message)

    @property
    def held(self) -> int:
        """Leases held, answered or not."""
        return len(self._leases)

    def holds(self, request: str, attempt: int) -> bool:
        """Whether this attempt is still this worker's."""
        return self._mine(request, attempt) is not None

    # -- messages from the relay

    def _welcome(self, message: m.Welcome) -> list[Action]:
        if self.link is not Link.GREETING:
            return []
        self.link = Link.OPEN if self._drain is None else Link.DRAINING
        self.heartbeat_s = message.heartbeat_s
        out: list[Action] = [Welcomed(welcome=message)]
        kept = {(each.request, each.attempt) for each in message.keep}
        out += [
            Send(message=back) for held, back in self._owed if (held.request, held.attempt) in kept
        ]
        self._owed.clear()
        for request, lease in list(self._leases.items()):
            if (request, lease.grant.attempt) not in kept:
                out += self._forget(request, lease.grant.attempt, "abandoned")
            elif lease.done is not None:
                out.append(Send(message=lease.done))
        if self.state == "loading" and self._told is not None:
            out.append(Send(message=self._told))  # a relay that was just started has not heard it
        out += self._pull()
        if message.drain:
            out += self.drain("ordered")
        return out + self._maybe_leave()

    def _refused(self, message: m.Refused) -> list[Action]:
        if message.code != UNKNOWN_SESSION:
            return [Fatal(code=message.code, detail=message.detail)]
        # While greeting, it answers what was said before the Hello that is on its way.
        return self.connected(self._heard_at) if self.link is not Link.GREETING else []

    def _grant(self, message: m.Grant) -> list[Action]:
        old = self._leases.get(message.request)
        if old is not None and old.grant.attempt >= message.attempt:
            return []
        if self.state != "warm" or not self._talking:
            end = LeaseEnd.RELEASED if self._drain is None else LeaseEnd.DRAINED
            back = m.Return(request=message.request, attempt=message.attempt, reason=end)
            return [Send(message=back)]
        out = self._forget(message.request, old.grant.attempt, "replaced") if old else []
        self._leases[message.request] = _Lease(grant=message)
        return [*out, Run(grant=message)]

    def _ack(self, message: m.Ack) -> list[Action]:
        lease = self._mine(message.request, message.attempt)
        if lease is None or lease.done is None:
            return []
        del self._leases[message.request]
        return [Settled(request=message.request, attempt=message.attempt), *self._maybe_leave()]

    def _reupload(self, message: m.Reupload) -> list[Action]:
        lease = self._mine(message.request, message.attempt)
        if lease is None or lease.done is None or lease.done.parts is None:
            return []
        done, lease.done = lease.done, None
        return [UploadAgain(grant=lease.grant, done=done)]

    def _abandon(self, message: m.Abandon) -> list[Action]:
        gone = self._forget(message.request, message.attempt, "abandoned")
        return gone + self._maybe_leave()

    def _cancel(self, message: m.Cancel) -> list[Action]:
        request, attempt = message.request, message.attempt
        lease = self._mine(request, attempt)
        if lease is None or lease.killing:
            return []
        if lease.done is not None:
            return self._forget(request, attempt, message.reason) + self._maybe_leave()
        lease.killing = True
        return [Kill(request=request, attempt=attempt, reason=message.reason, report=True)]

    def _steal(self, message: m.Steal) -> list[Action]:
        lease = self._mine(message.request, message.attempt)
        if lease is None or lease.started or lease.done is not None or lease.killing:
            return []
        return self._take_off(message.request, lease, "stolen", LeaseEnd.STOLEN)

    # -- inside

    @property
    def _talking(self) -> bool:
        return self.link in (Link.OPEN, Link.DRAINING)

    def _mine(self, request: str, attempt: int) -> _Lease | None:
        lease = self._leases.get(request)
        return lease if lease is not None and lease.grant.attempt == attempt else None

    def _held(self) -> list[m.Held]:
        return [held for held, _ in self._owed] + [
            m.Held(
                request=key,
                attempt=each.grant.attempt,
                started=each.started,
                sent=each.sent,
                size=each.size,
            )
            for key, each in self._leases.items()
        ]

    def _greet(self, now: float) -> list[Action]:
        self._sent_at = now
        hello = m.Hello(
            versions=sorted(m.SUPPORTED_VERSIONS),
            nonce=self.nonce,
            held=self._held(),
            state=self.state,
            facts=self.facts,
        )
        return [Send(message=hello)]

    def _tell_state(self, told: m.State) -> list[Action]:
        self._told = told
        return [Send(message=told), *self._pull()] if self._talking else []

    def _pull(self) -> list[Action]:
        if self.state not in ("warm", "draining"):
            return []
        return [Send(message=m.Pull(window=self.window, executors=self.executors))]

    def _take_off(self, request: str, lease: _Lease, why: str, end: LeaseEnd) -> list[Action]:
        kill = Kill(request=request, attempt=lease.grant.attempt, reason=why, report=False)
        return [kill, *self._give_back(request, lease, end, {})]

    def _give_back(
        self, request: str, lease: _Lease, end: LeaseEnd, evidence: Mapping[str, str]
    ) -> list[Action]:
        attempt = lease.grant.attempt
        del self._leases[request]
        told = {key: text[:_WORD] for key, text in evidence.items()}
        back = m.Return(request=request, attempt=attempt, reason=end, evidence=told)
        settled = Settled(request=request, attempt=attempt)
        if self._talking:
            return [settled, Send(message=back)]
        self._owed.append((m.Held(request=request, attempt=attempt, started=lease.started), back))
        return [settled]

    def _forget(self, request: str, attempt: int, reason: str) -> list[Action]:
        if self._mine(request, attempt) is None:
            return []
        del self._leases[request]
        return [
            Kill(request=request, attempt=attempt, reason=reason, report=False),
            Settled(request=request, attempt=attempt),
        ]

    def _maybe_leave(self) -> list[Action]:
        if self._drain is None or self._leases or self.link is Link.LEFT:
            return []
        # Without a connection there is nobody to tell; the pilot will, or the leases expire.
        bye = [Send(message=m.Goodbye(cause=self._drain))] if self._talking else []
        self.link = Link.LEFT
        return [*bye, Leave(cause=self._drain)]
