"""What the relay's surface takes: how fast, how many, how large, how slowly.

The relay faces strangers, so whatever one of them may ask for has a bound. The defaults are far above what people do: a
sweep of many clients never meets them, a loop that has run away does. Who is over a rate is first slowed, then refused
with words; who shows a valid token answers for themselves, everybody else for their address.
"""

from __future__ import annotations

from dataclasses import dataclass

from edif_hpc.errors import SettingsError
from edif_hpc.settings.base import Settings

_AT_LEAST_ONE = (
    "request_rate",
    "poll_rate",
    "subscribe_rate",
    "call_rate",
    "link_rate",
    "failed_login_rate",
    "max_connections",
    "max_connections_per_address",
    "max_sessions_per_token",
    "max_uploads_per_token",
    "max_open_requests",
    "slowest_rate",
)


@dataclass(frozen=True, kw_only=True, repr=False)
class SurfaceSettings(Settings):
    """The relay's settings against floods and hoards. Rates are per second, and allow a burst of ten seconds' worth."""

    #: requests per second that one token may send
    request_rate: int = 100
    #: polls for a result per second of one token; more are slowed and never refused
    poll_rate: int = 200
    #: connections for updates that one token may open per second
    subscribe_rate: int = 100
    #: other calls per second of one token, and all calls per second of one address that shows no valid token
    call_rate: int = 100
    #: signed links per second that one address may follow
    link_rate: int = 1000
    #: wrong API keys per second of one address; the right ones of that address go on working
    failed_login_rate: int = 2
    #: how long a call beyond its rate is held, before it is refused
    patience_s: float = 10.0
    #: HTTP connections that are open at one time
    max_connections: int = 4000
    #: of these, by one address; a NAT or a login node with many people is one address
    max_connections_per_address: int = 500
    #: connections for updates that one token may hold open
    max_sessions_per_token: int = 400
    #: request bodies that one token may be sending at one time
    max_uploads_per_token: int = 64
    #: requests of one token that have not ended
    max_open_requests: int = 10_000
    #: bytes of the requests of one token that have not ended
    max_open_bytes: int = 64 << 30
    #: space that new requests leave free on the relay's disk, for results and the queue; at most a twentieth of the disk
    min_free_bytes: int = 2 << 30
    #: how long a client may take to send a request's head
    head_s: float = 30.0
    #: how long a client may neither send the body that it announced nor take what it asked for
    stall_s: float = 120.0
    #: bytes per second that a client must move on average while there is something to move
    slowest_rate: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise SettingsError(
                    f"{self.section}: {name} is {getattr(self, name)}; it must be at least 1"
                )
