"""Every error that edif-hpc raises on purpose, and the code it has on the wire.

    EdifError
    ├── InvalidInput            what a person or a client sent cannot be used        (400)
    │   ├── UnsupportedClient   a client version that this relay does not speak      (400)
    │   ├── NotPermitted        a class, an env or a role outside what is allowed    (403)
    │   ├── NotAuthenticated    no token, or one that is unknown, revoked, expired   (401)
    │   ├── NotFound            nothing of that name is visible to the caller        (404)
    │   ├── Conflict            the name is taken, or the state forbids it           (409)
    │   ├── TooLarge            more bytes than the limit                            (413)
    │   └── TooSlow             what was announced does not come                     (408)
    ├── Unavailable             we cannot do it now; nothing was changed             (503)
    │   ├── TooMany             more, or more often, than the limit                  (429)
    │   ├── StoreUnavailable    a commit failed: disk full, read-only, corrupt
    │   └── SlurmUnavailable    Slurm did not answer, so nothing is known about any job
    ├── OverLimit               a request used more than it may
    ├── TransitionRefused       the table of states does not list it; nothing changed
    │   └── StaleAttempt        a write by an attempt that no longer holds the lease
    ├── ProtocolError           a peer's message is malformed, too large or out of turn
    │   ├── RemoteProtocolError their fault
    │   └── LocalProtocolError  our fault
    ├── HandshakeRefused        the relay's CURVE or ZAP layer turned this peer away
    ├── EngineError             the zygote or an executor cannot serve
    │   └── IsolationTooWeak    the level reached is below the operator's floor
    ├── SettingsError           a setting is unknown, malformed or missing
    └── LaunchError             a pilot or worker could not be started
        ├── SubmitRefused       the scheduler said no; nothing was submitted
        └── SubmitUnknown       no answer that counts: it may have been submitted, or not

A message says what was observed, the value, and the way out. Callers branch on the class or on `code`, never on
the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

RefusalKind = Literal["retry", "config", "quota"]


class EdifError(Exception):
    """The base of all deliberate errors; `code` is the name of the class on the wire."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500

    @property
    def told(self) -> str:
        """What people who are not this machine's operator may read of it."""
        return str(self)


class InvalidInput(EdifError):
    """The input cannot be used as it was given."""

    code = "invalid_input"
    http_status = 400


class UnsupportedClient(InvalidInput):
    """The client speaks a protocol that this relay does not serve."""

    code = "unsupported_client"


class NotPermitted(InvalidInput):
    """The caller is known, but this is not allowed to them."""

    code = "not_permitted"
    http_status = 403


class NotAuthenticated(InvalidInput):
    """The token is missing, unknown, revoked or expired."""

    code = "not_authenticated"
    http_status = 401


class NotFound(InvalidInput):
    """Nothing of that name is visible to the caller."""

    code = "not_found"
    http_status = 404


class Conflict(InvalidInput):
    """The name is taken, or the present state forbids the change."""

    code = "conflict"
    http_status = 409


class TooLarge(InvalidInput):
    """The input has more bytes than the limit."""

    code = "too_large"
    http_status = 413


class TooSlow(InvalidInput):
    """The head or the body of a request does not come, or comes in a trickle."""

    code = "too_slow"
    http_status = 408


class Unavailable(EdifError):
    """The service cannot do this now; nothing was changed and a retry may succeed."""

    code = "unavailable"
    http_status = 503


class TooMany(Unavailable):
    """More, or more often, than the limit allows. After `retry_s` it may be asked again, if that is known."""

    code = "too_many"
    http_status = 429

    def __init__(self, message: str, *, retry_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_s = retry_s


class StoreUnavailable(Unavailable):
    """A commit failed, so nothing in its group happened. `place` is a file of ours: the operator's business alone."""

    code = "store_unavailable"

    def __init__(self, message: str, *, place: str = "") -> None:
        super().__init__(f"{place}: {message}" if place else message)
        self.message, self.place = message, place

    @property
    def told(self) -> str:
        """The same without the place."""
        return self.message


class SlurmUnavailable(Unavailable):
    """Slurm did not answer, or not with sense. What it would have said is unknown: no job is gone because of it."""

    code = "slurm_unavailable"


class OverLimit(EdifError):
    """A request used more than it may; `details` name the limit, its value and who set it."""

    code = "over_limit"

    def __init__(self, message: str, details: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class TransitionRefused(EdifError):
    """The transition table does not list this change; nothing was changed."""

    code = "transition_refused"
    http_status = 409


class StaleAttempt(TransitionRefused):
    """The write carries an attempt that does not hold the lease (any more)."""

    code = "stale_attempt"


class ProtocolError(EdifError):
    """A message breaks the wire protocol."""

    code = "protocol"


class RemoteProtocolError(ProtocolError):
    """The peer sent something malformed, too large or out of turn."""

    code = "remote_protocol"


class LocalProtocolError(ProtocolError):
    """This side tried to send something that the protocol does not allow."""

    code = "local_protocol"


class HandshakeRefused(EdifError):
    """The other side's CURVE or ZAP layer refused this peer."""

    code = "handshake_refused"


class EngineError(EdifError):
    """The engine (zygote, executors) cannot serve."""

    code = "engine"


class IsolationTooWeak(EngineError):
    """The isolation level reached on this machine is below the operator's floor."""

    code = "isolation_too_weak"


class SettingsError(EdifError):
    """A setting is unknown, malformed or missing."""

    code = "settings"


class LaunchError(EdifError):
    """A pilot or a worker could not be started."""

    code = "launch"


class SubmitRefused(LaunchError):
    """The scheduler refused a submission, so nothing was submitted.

    `kind` says what helps: `retry` (it cannot now), `quota` (a limit is reached; it may pass), `config` (it never will,
    as it was asked for).
    """

    code = "submit_refused"

    def __init__(self, detail: str, *, kind: RefusalKind) -> None:
        super().__init__(detail)
        self.kind: RefusalKind = kind


class SubmitUnknown(LaunchError):
    """A submission had no answer that counts. Whoever gets it looks for the name before another try."""

    code = "submit_unknown"
