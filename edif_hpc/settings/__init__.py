"""What an operator or a user may set, read once when a process starts.

    flags  >  environment  >  file  >  defaults

A settings class is a frozen dataclass; its fields are the settings, their comments the reference. Its section names the
table of the TOML file and the prefix of the environment: `port` of the section `relay` is `[relay] port = 8710` in the
file and `EDIF_RELAY_PORT` in the environment. A key that does not exist is refused by name, together with those that
do, so a misspelt setting never goes unnoticed. Durations end in `_s`, sizes in `_bytes`.

`reading` is the only module that reads the environment; everybody else is given a settings object, or a value of it.
"""

from __future__ import annotations

from edif_hpc.settings.base import Settings, is_loopback
from edif_hpc.settings.client import DEFAULT_RELAY, ClientSettings
from edif_hpc.settings.reading import SECTIONS, default_file, load, load_client
from edif_hpc.settings.relay import LOG_LEVELS, RelaySettings

__all__ = [
    "DEFAULT_RELAY",
    "LOG_LEVELS",
    "SECTIONS",
    "ClientSettings",
    "RelaySettings",
    "Settings",
    "default_file",
    "is_loopback",
    "load",
    "load_client",
]
