"""The messages between the relay and its peers: worker, pilot and launcher.

One protocol, three roles. Each message is a frozen struct with a tag; `codec` turns it into one msgpack frame and
checks types and lengths on the way in. A lease is always named by `(request, attempt)`.

Who speaks:

    peer → relay   Hello, State, Pull, Started, Renew, Log, Need, Done, Return, Report, Revive, Ordered, Goodbye
    relay → peer   Welcome, Refused, Grant, Parts, Ack, Reupload, Abandon, Cancel, Steal, Drain, Order, Beat

Delivery is at most once, so everything that must not be lost is either repeated until it is acknowledged (`Done`
until `Ack`), re-presented after a reconnect (`Hello.held`), or absolute instead of a difference (`Pull.window`).
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

PROTOCOL_VERSION = 1
SUPPORTED_VERSIONS = frozenset({1})

Id = Annotated[str, Meta(min_length=1, max_length=64)]
Word = Annotated[str, Meta(max_length=200)]
Text = Annotated[str, Meta(max_length=64 << 10)]
Inline = Annotated[bytes, Meta(max_length=1 << 20)]
Attempt = Annotated[int, Meta(ge=1, le=1 << 31)]
Size = Annotated[int, Meta(ge=0, le=1 << 50)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e9)]
Window = Annotated[int, Meta(ge=0, le=256)]
HEARD = "heard"  #: the reason of an `Order` that answers an `Ordered`
MAX_HELD = 1024  #: more than a window: a lease stays held until its `Done` is acknowledged


class Held(Struct, frozen=True, kw_only=True, array_like=True):
    """A lease that a peer says it holds. Of one that has run and whose result goes up, how much of it is there."""

    request: Id
    attempt: Attempt
    started: bool = False
    sent: Size = 0
    size: Size = 0


Turn = Annotated[int, Meta(ge=0, le=1 << 31)]
HeldList = Annotated[list[Held], Meta(max_length=MAX_HELD)]


class Message(Struct, frozen=True, kw_only=True, tag_field="t", omit_defaults=True):
    """The base of all messages."""


# -- peer → relay ----------------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """The first message on each connection. `nonce` is new at each boot of the process.

    A pilot adds the scheduler's id of its job, how often that was started again, and how much of its walltime is left by
    the node's own clock.
    """

    versions: Annotated[list[int], Meta(min_length=1, max_length=8)]
    nonce: Id
    held: HeldList = []
    state: Word = "loading"
    facts: dict[str, Any] = {}
    left_s: Seconds | None = None
    job: Word | None = None
    restart: Window = 0


class State(Message, frozen=True, tag="state"):
    """Where the peer is: loading, warm, draining. `facts` replaces the environment told before, if not empty.

    While it loads, `detail` is the stage, with `done` of `total` bytes where they are known.
    """

    state: Word
    detail: Word = ""
    progress: Annotated[float, Meta(ge=0.0, le=1.0)] | None = None
    done: Size = 0
    total: Size = 0
    facts: dict[str, Any] = {}


class Pull(Message, frozen=True, tag="pull"):
    """How many leases the worker is willing to hold at once, and how many of them it runs at a time."""

    window: Window
    executors: Window


class Started(Message, frozen=True, tag="started"):
    """The executor has been given the request."""

    request: Id
    attempt: Attempt


class Renew(Message, frozen=True, tag="renew"):
    """The heartbeat: all leases held. Empty is a heartbeat too. A pilot's says how much of its walltime is left."""

    held: HeldList = []
    left_s: Seconds | None = None


class Log(Message, frozen=True, tag="log"):
    """Printed lines of a running request."""

    request: Id
    attempt: Attempt
    text: Text


class Need(Message, frozen=True, tag="need"):
    """Ask for upload URLs of a result: parts `first` to `first + count - 1`, counted from 1."""

    request: Id
    attempt: Attempt
    first: Annotated[int, Meta(ge=1, le=10_000)]
    count: Annotated[int, Meta(ge=1, le=64)]


class Part(Struct, frozen=True, kw_only=True, array_like=True):
    """One uploaded part and the tag that the store gave it."""

    number: Annotated[int, Meta(ge=1, le=10_000)]
    etag: Word = ""


class Done(Message, frozen=True, tag="done"):
    """The end of an attempt. Exactly one of `inline`, `parts` (uploaded) and `error` is set. Repeated until `Ack`."""

    request: Id
    attempt: Attempt
    size: Size = 0
    inline: Inline | None = None
    parts: Annotated[list[Part], Meta(max_length=10_000)] | None = None
    error: Word | None = None  #: a `FailureKind`
    message: Text = ""
    meta: dict[str, Any] = {}

    def __post_init__(self) -> None:
        told = [each for each in (self.inline, self.parts, self.error) if each is not None]
        if len(told) != 1:
            raise ValueError(
                f"a Done has one of inline, parts and error; this one has {len(told)}"
            )


class Return(Message, frozen=True, tag="return"):
    """A lease given back without an answer; `reason` is a `LeaseEnd`."""

    request: Id
    attempt: Attempt
    reason: Word
    evidence: dict[str, Word] = {}


class Report(Message, frozen=True, tag="report"):
    """A pilot's words about its worker's process: `worker_started`, `worker_exited`; and the tail of its log."""

    event: Word
    detail: Text = ""
    nonce: Annotated[str, Meta(max_length=64)] = ""  #: which of its processes: that of its `Hello`


class Revive(Message, frozen=True, tag="revive"):
    """A pilot asks for the ticket of its successor; without `may_submit` it only asks whether there is one.

    Each asking takes the ticket anew, and of several only the newest is good for anything. `turn` tells their answers apart.
    """

    may_submit: bool = True
    turn: Turn = 0


class Ordered(Message, frozen=True, tag="ordered"):
    """What became of an `Order`: the id of the job, or why the scheduler refused it. Repeated until it is answered."""

    allocation: Id
    job_id: Word | None = None
    refusal: Word | None = None  #: "retry", "config" or "quota"
    detail: Text = ""
    turn: Turn = 0

    def __post_init__(self) -> None:
        if (self.job_id is None) == (self.refusal is None):
            raise ValueError("an Ordered has a job_id or a refusal, one of them")


class Goodbye(Message, frozen=True, tag="goodbye"):
    """The peer leaves for good and holds nothing."""

    cause: Word


# -- relay → peer ----------------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """The answer to `Hello`: the rules of this connection, and which of the held leases still stand."""

    version: Annotated[int, Meta(ge=1)]
    lease_s: Seconds
    heartbeat_s: Seconds
    part_bytes: Size
    patience_s: Seconds = (
        3600.0  #: how long a store that takes no result is tried before it is an error
    )
    keep: HeldList = []
    drain: bool = False
    deployment: dict[str, Any] = {}  #: for a worker: what it serves


class Refused(Message, frozen=True, tag="refused"):
    """The peer is not served; `code` is an error's wire code. `unknown_session` asks for a new `Hello`."""

    code: Word
    detail: Text = ""


class Grant(Message, frozen=True, tag="grant"):
    """A lease, and all that is needed to run it. The blob is inline or behind `blob_url`."""

    request: Id
    attempt: Attempt
    model_key: Text
    compress: bool
    env: dict[str, Any]
    limits: dict[str, float]
    limit_sources: dict[str, Text] = {}  #: who set each of them, for the error that names it
    blob: bytes | None = None
    blob_url: Text = ""
    blob_bytes: Size = 0
    blob_sha256: Word = ""
    ahead: bool = False  #: prefetched: it may be stolen until it starts


class Parts(Message, frozen=True, tag="parts"):
    """Upload URLs for the parts `first`, `first + 1`, …; short-lived, ask again for those that expired."""

    request: Id
    attempt: Attempt
    first: Annotated[int, Meta(ge=1, le=10_000)]
    urls: Annotated[list[Text], Meta(max_length=64)]
    refusal: Word = ""  #: why there are none now: the store is away, or full


class Ack(Message, frozen=True, tag="ack"):
    """`Done` is committed (`accepted`) or refused as stale; either way the worker forgets the lease."""

    request: Id
    attempt: Attempt
    accepted: bool
    detail: Word = ""


class Reupload(Message, frozen=True, tag="reupload"):
    """The upload that a `Done` named is not known (any more): put the parts again, then say `Done` again."""

    request: Id
    attempt: Attempt


class Abandon(Message, frozen=True, tag="abandon"):
    """The lease is no longer the worker's; stop and forget it."""

    request: Id
    attempt: Attempt


class Cancel(Message, frozen=True, tag="cancel"):
    """The request has ended without the worker; kill its executor and `Return` the lease."""

    request: Id
    attempt: Attempt
    reason: Word


class Steal(Message, frozen=True, tag="steal"):
    """Give a prefetched lease back, unless it has started."""

    request: Id
    attempt: Attempt


class Drain(Message, frozen=True, tag="drain"):
    """Take no more leases, finish what runs, say `Goodbye`."""

    reason: Word


class Order(Message, frozen=True, tag="order"):
    """The ticket of a successor: submit this allocation. Without an allocation there is nothing to submit, for `reason`.

    The same, empty but for the reason `HEARD`, answers an `Ordered`. `turn` is that of what it answers.
    """

    allocation: Id | None = None
    name: Word = ""
    join_token: Word = ""
    deployment: Word = ""
    slot: Annotated[int, Meta(ge=0, le=1 << 20)] = 0
    generation: Annotated[int, Meta(ge=0, le=1 << 31)] = 0
    gpu: Word | None = None
    gpus: Window = 0
    walltime_min: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    exclude: Annotated[list[Word], Meta(max_length=1000)] = []
    begin_after_s: Seconds = 0.0
    reason: Text = ""
    turn: Turn = 0


class Beat(Message, frozen=True, tag="beat"):
    """The relay's answer to `Renew`."""


FromPeer = (
    Hello
    | State
    | Pull
    | Started
    | Renew
    | Log
    | Need
    | Done
    | Return
    | Report
    | Revive
    | Ordered
    | Goodbye
)
FromRelay = (
    Welcome
    | Refused
    | Grant
    | Parts
    | Ack
    | Reupload
    | Abandon
    | Cancel
    | Steal
    | Drain
    | Order
    | Beat
)
