"""The settings of the relay, and which of them go together."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from edif_hpc.errors import SettingsError
from edif_hpc.settings.base import is_loopback, strip_url
from edif_hpc.settings.limits import LimitSettings
from edif_hpc.settings.surface import SurfaceSettings

LOG_LEVELS = ("debug", "info", "warning", "error")

_URLS = (
    "public_url",
    "worker_base_url",
    "hub_upstream",
    "s3_endpoint",
    "s3_worker_endpoint",
    "s3_public_endpoint",
)
_LONGEST_S3_LINK_S = 7 * 24 * 3600.0
_S3_PREFIX = re.compile(r"(?:[A-Za-z0-9_.-]+/)*", re.ASCII)


@dataclass(frozen=True, kw_only=True, repr=False)
class RelaySettings(SurfaceSettings, LimitSettings):
    """Settings of the relay."""

    section: ClassVar[str] = "relay"

    #: folder of the queue, request blobs, results and keys
    data_dir: Path = Path("~/.local/state/edif-hpc")
    #: address that HTTP binds to
    host: str = "127.0.0.1"
    #: port of HTTP; 0 takes a free one
    port: int = 8710
    #: ZeroMQ endpoint that workers and pilots connect to; `*` as its port takes a free one
    worker_bind: str = "tcp://127.0.0.1:8711"
    #: the same as seen from the cluster, if it differs from what is bound
    worker_endpoint: str | None = None
    #: the relay's HTTP address as seen from the cluster, for large blobs and results
    worker_base_url: str | None = None
    #: the relay's HTTP address as researchers write it; None takes it from each request
    public_url: str | None = None
    #: a reverse proxy ends TLS and is the only way here: X-Forwarded-Proto and the last address of X-Forwarded-For are believed
    behind_proxy: bool = False
    #: certificate chain in PEM, to end TLS here
    tls_cert: Path | None = None
    #: private key of the certificate in PEM
    tls_key: Path | None = None
    #: largest request that a researcher may send
    max_request_bytes: int = 1 << 30
    #: S3 bucket that results go to; None keeps them in data_dir
    s3_bucket: str | None = None
    #: address of the S3 store as the relay reaches it
    s3_endpoint: str | None = None
    #: the same as workers reach it, if it differs
    s3_worker_endpoint: str | None = None
    #: the same as researchers reach it, if it differs
    s3_public_endpoint: str | None = None
    #: name of the S3 key
    s3_access_key: str | None = None
    #: the S3 key's secret; only the relay has it
    s3_secret_key: str | None = field(default=None, metadata={"secret": True})
    #: region that S3 signatures name; a site's own store takes the default
    s3_region: str = "us-east-1"
    #: what all object names in the bucket begin with; nothing else in it is touched
    s3_prefix: str = "edif-hpc/"
    #: how long a signed S3 URL is valid
    s3_link_s: float = 3600.0
    #: how long a result is tried on a store that does not take it, before its request ends in an error
    store_patience_s: float = 3600.0
    #: how long results are kept
    result_retention_s: float = 7 * 24 * 3600.0
    #: how long a request may wait before it ends in an error, if its token does not say
    queue_s: float = 24 * 3600.0
    #: how long a queued request outlives its client's connection
    ws_grace_s: float = 60.0
    #: pause between the pings that keep researchers' connections open through NATs
    ws_ping_interval_s: float = 20.0
    #: how long a repeated poll is held when nothing has changed
    poll_hold_s: float = 1.0
    #: how long a worker may be silent before its requests go to another
    lease_s: float = 30.0
    #: pause between the heartbeats of workers
    heartbeat_s: float = 5.0
    #: so long before the end of its walltime a worker is given nothing that would not have ended, and leaves
    end_margin_s: float = 95.0
    #: how long a job is expected to wait in a site's queue, until enough were seen there
    first_wait_s: float = 600.0
    #: how long a worker is expected to take from its job's start until it is warm, until enough were seen
    first_warmup_s: float = 180.0
    #: so much earlier than it probably takes a successor is ordered
    lead_margin_s: float = 120.0
    #: how many jobs may be submitted to one site in ten minutes
    submits_per_10_min: int = 4
    #: the real Hub behind `/hub`, such as https://huggingface.co; None answers only for what is here
    hub_upstream: str | None = None
    #: names that may be asked of the real Hub, besides deployed ones: patterns with `*`, apart by commas or spaces
    hub_allow: str = ""
    #: deployments from a folder of the relay's disk whose weights the hub hands out: patterns as in hub_allow
    hub_weights: str = ""
    #: the hub answers only who shows an API key of this relay as the Hub's token (HF_TOKEN)
    hub_login: bool = False
    #: largest model that may be published on the hub, weights included if they are
    hub_max_bytes: int = 64 << 30
    #: for tests: where to kill, stop or raise
    failpoints: str = ""
    #: debug, info, warning or error
    log_level: str = "info"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"relay: port is {self.port}; it must be 0 to 65535")
        if self.log_level not in LOG_LEVELS:
            raise SettingsError(
                f"relay: log_level is {self.log_level!r}; use one of: {', '.join(LOG_LEVELS)}"
            )
        if self.submits_per_10_min < 1:
            raise SettingsError(
                f"relay: submits_per_10_min is {self.submits_per_10_min}; it must be at least 1"
            )
        if self.lead_margin_s < self.end_margin_s:
            raise SettingsError(
                f"relay: lead_margin_s ({self.lead_margin_s}) is below end_margin_s ({self.end_margin_s}): "
                "a worker would leave before its successor is there"
            )
        if self.default_wall_s > self.max_wall_s:
            raise SettingsError(
                f"relay: default_wall_s ({self.default_wall_s}) is above max_wall_s ({self.max_wall_s})"
            )
        if self.lease_s < 2 * self.heartbeat_s:
            raise SettingsError(
                f"relay: lease_s ({self.lease_s}) must be at least two heartbeats ({self.heartbeat_s} s each), "
                "or one lost message ends a lease"
            )
        for name in _URLS:
            strip_url(self, name)
        self._check_s3()
        self._check_exposure()

    @property
    def tls(self) -> bool:
        """Whether TLS ends here."""
        return self.tls_cert is not None

    def _check_s3(self) -> None:
        needed = ("s3_bucket", "s3_endpoint", "s3_access_key", "s3_secret_key")
        missing = [name for name in needed if getattr(self, name) is None]
        if missing and len(missing) < len(needed):
            raise SettingsError(
                f"relay: {', '.join(needed)} belong together; not set: {', '.join(missing)}"
            )
        if not 1 <= self.s3_link_s <= _LONGEST_S3_LINK_S:
            raise SettingsError(
                f"relay: s3_link_s is {self.s3_link_s}; S3 signs for 1 to {_LONGEST_S3_LINK_S:.0f} s"
            )
        if _S3_PREFIX.fullmatch(self.s3_prefix) is None:
            raise SettingsError(
                f"relay: s3_prefix is {self.s3_prefix!r}; it must be folders that each end in a slash"
            )

    def _check_exposure(self) -> None:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("relay: tls_cert and tls_key belong together; set both or none")
        if not (is_loopback(self.host) or self.tls or self.behind_proxy):
            raise SettingsError(
                f"relay: binding {self.host} without TLS would send API keys and code in the clear. Set tls_cert and "
                "tls_key, or behind_proxy if a reverse proxy ends TLS, or bind 127.0.0.1 and use an SSH tunnel"
            )
