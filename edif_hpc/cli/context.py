"""What every command is given: the environment as it was at the start, the settings file, and the way to a relay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from edif_hpc.cli.api import Api
    from edif_hpc.settings import RelaySettings


@dataclass(frozen=True, kw_only=True)
class Context:
    """The facts that all commands share."""

    environ: Mapping[str, str]
    config: Path | None = None
    relay: str | None = None

    def api(self) -> Api:
        """The relay that the settings name."""
        from edif_hpc.cli.api import Api
        from edif_hpc.settings import load_client

        flags = {"relay": self.relay}
        return Api(load_client(flags=flags, environ=self.environ, file=self.config))

    def relay_settings(self, flags: Mapping[str, Any]) -> RelaySettings:
        """The settings of a relay on this machine."""
        from edif_hpc.settings import RelaySettings, load

        return load(RelaySettings, flags=flags, environ=self.environ, file=self.config)

    @property
    def config_file(self) -> Path:
        """Where the settings file is, or would be."""
        from edif_hpc.settings import default_file

        return self.config or default_file(self.environ)

    @property
    def state_dir(self) -> Path:
        """Where this user's edif-hpc keeps what it must remember, outside any relay."""
        home = self.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(home).expanduser() / "edif-hpc"


pass_context = click.make_pass_decorator(Context)
