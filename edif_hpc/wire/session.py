"""The worker's end of the wire protocol as a state machine without I/O.

Events in (a message came, an executor began, time passed), `actions` out (send this, run that, kill it, reconnect, leave).
It owns the leases and what must be repeated: a `Done` until it is acknowledged, a `Hello` until it is welcomed.
`worker.runtime` carries the actions out.

    GREETING ──Welcome──► OPEN ──drain──► DRAINING ──nothing held──► LEFT
        ▲───── silence, Refused(unknown_session) ─────┘

Time is an argument, in monotonic seconds. The relay's end is `turns`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

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


@dataclass(kw_only=True)
class WorkerSession:
    """The worker's end. Every method returns the actions to carry out, in order."""

    nonce: str
    window: int
    executors: int
    state: str = "loading"
    facts: dict[str, object] = field(default_factory=dict)
    link: Link = Link.GREETING
    heartbeat_s: float = HEARTBEAT_S
    _leases: dict[str, _Lease] = field(default_factory=dict)
    _heard_at: float = 0.0
    _sent_at: float = 0.0
    _drain: str | None = None

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
        facts: dict[str, object] | None = None,
    ) -> list[Action]:
        """The worker's own state changed; a warm worker says how much it takes."""
        self.state = state
        self.facts = facts if facts is not None else self.facts
        if self.link is Link.GREETING:
            return []
        out: list[Action] = [
            Send(
                message=m.State(
                    state=state, detail=detail[:200], progress=progress, facts=facts or {}
                )
            )
        ]
        return out + self._pull()

    def began(self, request: str, attempt: int) -> list[Action]:
        """An executor was given the request; from now on it cannot be stolen."""
        lease = self._mine(request, attempt)
        if lease is None:
            return []
        lease.started = True
        return [Send(message=m.Started(request=request, attempt=attempt))] if self._talking else []

    def finished(self, done: m.Done, now: float) -> list[Action]:
        """An attempt ended; its `Done` is kept until the relay answers."""
        lease = self._mine(done.request, done.attempt)
        if lease is None:
            return [Settled(request=done.request, attempt=done.attempt)]
        lease.done, lease.done_at = done, now
        return [Send(message=done)] if self._talking else []

    def killed(self, request: str, attempt: int) -> list[Action]:
        """An executor that `Kill` named is gone."""
        lease = self._mine(request, attempt)
        if lease is None:
            return []
        return self._give_back(request, lease, LeaseEnd.RELEASED) + self._maybe_leave()

    def returned(
        self, request: str, attempt: int, end: LeaseEnd, evidence: dict[str, str]
    ) -> list[Action]:
        """An attempt ended without an answer (its executor died): the relay decides whether it runs again."""
        lease = self._mine(request, attempt)
        if lease is None:
            return []
        return self._give_back(request, lease, end, evidence) + self._maybe_leave()

    def drain(self, reason: str) -> list[Action]:
        """Take no more leases: give back what has not started, finish the rest, leave."""
        if self._drain is not None:
            return []
        self._drain = reason
        self.window = 0
        out: list[Action] = [Draining(reason=reason)]
        if self._talking:
            self.link = Link.DRAINING
            out += self.changed("draining", detail=reason)
        for request, lease in list(self._leases.items()):
            if not lease.started and lease.done is None:
                out.append(
                    Kill(
                        request=request,
                        attempt=lease.grant.attempt,
                        reason="drained",
                        report=False,
                    )
                )
                out += self._give_back(request, lease, LeaseEnd.DRAINED)
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
        out: list[Action] = [Send(message=m.Renew(held=self._held()))]
        for lease in self._leases.values():
            if lease.done is not None and now - lease.done_at > self.heartbeat_s:
                out.append(Send(message=lease.done))
        return out

    # -- messages from the relay

    def received(self, message: m.FromRelay, now: float) -> list[Action]:
        """One message of the relay."""
        self._heard_at = now
        match message:
            case m.Welcome():
                return self._welcome(message)
            case m.Refused():
                return self._refused(message, now)
            case m.Grant():
                return self._grant(message)
            case m.Ack():
                return self._ack(message)
            case m.Parts():
                return [Urls(parts=message)]
            case m.Reupload():
                return self._reupload(message)
            case m.Abandon():
                return (
                    self._forget(message.request, message.attempt, "abandoned")
                    + self._maybe_leave()
                )
            case m.Cancel():
                return self._cancel(message)
            case m.Steal():
                return self._steal(message)
            case m.Drain():
                return self.drain(message.reason)
            case m.Beat():
                return []

    @property
    def held(self) -> int:
        """Leases held, answered or not."""
        return len(self._leases)

    def holds(self, request: str, attempt: int) -> bool:
        """Whether this attempt is still this worker's."""
        return self._mine(request, attempt) is not None

    # -- inside

    @property
    def _talking(self) -> bool:
        return self.link in (Link.OPEN, Link.DRAINING)

    def _mine(self, request: str, attempt: int) -> _Lease | None:
        lease = self._leases.get(request)
        return lease if lease is not None and lease.grant.attempt == attempt else None

    def _held(self) -> list[m.Held]:
        return [
            m.Held(request=key, attempt=each.grant.attempt, started=each.started)
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

    def _pull(self) -> list[Action]:
        if self.state != "warm" and self._drain is None:
            return []
        return [Send(message=m.Pull(window=self.window, executors=self.executors))]

    def _welcome(self, message: m.Welcome) -> list[Action]:
        if self.link is not Link.GREETING:
            return []
        self.link = Link.OPEN
        self.heartbeat_s = message.heartbeat_s
        kept = {(each.request, each.attempt) for each in message.keep}
        out: list[Action] = [Welcomed(welcome=message)]
        for request, lease in list(self._leases.items()):
            if (request, lease.grant.attempt) not in kept:
                out += self._forget(request, lease.grant.attempt, "abandoned")
            elif lease.done is not None:
                out.append(Send(message=lease.done))
        if self._drain is not None:
            self.link = Link.DRAINING
        out += self._pull()
        if message.drain:
            out += self.drain("ordered")
        return out + self._maybe_leave()

    def _refused(self, message: m.Refused, now: float) -> list[Action]:
        if message.code == UNKNOWN_SESSION:
            return self.connected(now) if self.link is not Link.GREETING else []
        return [Fatal(code=message.code, detail=message.detail)]

    def _grant(self, message: m.Grant) -> list[Action]:
        if self._drain is not None or not self._talking:
            return [
                Send(
                    message=m.Return(
                        request=message.request, attempt=message.attempt, reason=LeaseEnd.DRAINED
                    )
                )
            ]
        old = self._leases.get(message.request)
        if old is not None and old.grant.attempt >= message.attempt:
            return []
        out = (
            self._forget(message.request, old.grant.attempt, "replaced") if old is not None else []
        )
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
        if lease is None or lease.done is None:
            return []
        done, lease.done = lease.done, None
        return [UploadAgain(done=done)]

    def _cancel(self, message: m.Cancel) -> list[Action]:
        lease = self._mine(message.request, message.attempt)
        if lease is None or lease.killing:
            return []
        if lease.done is not None:
            return (
                self._forget(message.request, message.attempt, message.reason)
                + self._maybe_leave()
            )
        lease.killing = True
        return [
            Kill(
                request=message.request,
                attempt=message.attempt,
                reason=message.reason,
                report=True,
            )
        ]

    def _steal(self, message: m.Steal) -> list[Action]:
        lease = self._mine(message.request, message.attempt)
        if lease is None or lease.started or lease.done is not None:
            return []
        kill = Kill(
            request=message.request, attempt=message.attempt, reason="stolen", report=False
        )
        return [kill, *self._give_back(message.request, lease, LeaseEnd.STOLEN)]

    def _give_back(
        self, request: str, lease: _Lease, end: LeaseEnd, evidence: dict[str, str] | None = None
    ) -> list[Action]:
        del self._leases[request]
        if not self._talking:
            return []  # the next Hello does not present it, which gives it back
        back = m.Return(
            request=request, attempt=lease.grant.attempt, reason=end, evidence=evidence or {}
        )
        return [Send(message=back)]

    def _forget(self, request: str, attempt: int, reason: str) -> list[Action]:
        lease = self._mine(request, attempt)
        if lease is None:
            return []
        del self._leases[request]
        return [
            Kill(request=request, attempt=attempt, reason=reason, report=False),
            Settled(request=request, attempt=attempt),
        ]

    def _maybe_leave(self) -> list[Action]:
        if self._drain is None or self._leases or self.link is not Link.DRAINING:
            return []
        self.link = Link.LEFT
        return [Send(message=m.Goodbye(cause=self._drain)), Leave(cause=self._drain)]
