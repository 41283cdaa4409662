"""What all settings classes share: checks by unit, a repr that hides secrets, and two checks of addresses."""

from __future__ import annotations

import dataclasses
import ipaddress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from edif_hpc.errors import SettingsError


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """What all settings classes share: checks by unit, and a repr that hides secrets."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.name.endswith(("_s", "_bytes")) and value is not None and value < 0:
                raise SettingsError(
                    f"{self.section}: {each.name} is {value}; it cannot be negative"
                )
            if isinstance(value, Path):
                object.__setattr__(self, each.name, value.expanduser())

    def __repr__(self) -> str:
        parts = (
            f"{each.name}={'***' if each.metadata.get('secret') else repr(getattr(self, each.name))}"
            for each in dataclasses.fields(self)
        )
        return f"{type(self).__name__}({', '.join(parts)})"


def is_loopback(host: str) -> bool:
    """Whether an address can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def strip_url(settings: Settings, name: str) -> None:
    """Check that a setting is a URL, if it is set, and take the slash off its end."""
    url = getattr(settings, name)
    if url is None:
        return
    if not url.startswith(("http://", "https://")):
        raise SettingsError(
            f"{settings.section}: {name} is {url!r}; it must start with http:// or https://"
        )
    object.__setattr__(settings, name, url.rstrip("/"))
