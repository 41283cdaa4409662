"""What `wire.session.WorkerSession` asks its runtime to do: plain values, in the order in which they are to be done."""

from __future__ import annotations

from dataclasses import dataclass

from edif_hpc.wire import messages as m


@dataclass(frozen=True, kw_only=True)
class Send:
    """Put this message on the wire."""

    message: m.Message


@dataclass(frozen=True, kw_only=True)
class Run:
    """Give this request to an executor as soon as one is free."""

    grant: m.Grant


@dataclass(frozen=True, kw_only=True)
class Kill:
    """Stop this attempt if it runs, drop it if it waits, and report `killed` if `report`."""

    request: str
    attempt: int
    reason: str
    report: bool


@dataclass(frozen=True, kw_only=True)
class Urls:
    """Upload URLs that were asked for."""

    parts: m.Parts


@dataclass(frozen=True, kw_only=True)
class UploadAgain:
    """The relay lost sight of this result's upload; put it again, then report `finished`."""

    grant: m.Grant
    done: m.Done


@dataclass(frozen=True, kw_only=True)
class Settled:
    """This attempt is over for this worker: answered, given back or taken away. Its files may go."""

    request: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Welcomed:
    """The relay accepted this connection under these rules."""

    welcome: m.Welcome


@dataclass(frozen=True, kw_only=True)
class Draining:
    """No more leases will come; finish what runs."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Reconnect:
    """Drop the connection and make a new one: the relay is silent."""

    silent_s: float


@dataclass(frozen=True, kw_only=True)
class Leave:
    """Everything is answered; end the process."""

    cause: str


@dataclass(frozen=True, kw_only=True)
class Fatal:
    """The relay refuses this peer for good."""

    code: str
    detail: str


Action = (
    Send
    | Run
    | Kill
    | Urls
    | UploadAgain
    | Settled
    | Welcomed
    | Draining
    | Reconnect
    | Leave
    | Fatal
)
