"""The settings of who calls the relay."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from edif_hpc.settings.base import Settings, strip_url

DEFAULT_RELAY = "http://127.0.0.1:8710"


@dataclass(frozen=True, kw_only=True, repr=False)
class ClientSettings(Settings):
    """Settings of the command line and of the researcher's package."""

    section: ClassVar[str] = "client"

    #: the relay's address
    relay: str = DEFAULT_RELAY
    #: the API key, `edif_<id>_<secret>`
    token: str | None = field(default=None, metadata={"secret": True})

    def __post_init__(self) -> None:
        super().__post_init__()
        strip_url(self, "relay")
