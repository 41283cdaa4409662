"""A launcher's rounds, done by a command while it waits: for sites where no launcher runs, yet or any more.

Two launchers must not get into each other's way: rounds begin only if none of the site has been heard of lately, and under the
lock that a launcher holds. Whoever has begun goes on until it ends.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self

from edif_hpc.cli.api import Api
from edif_hpc.cli.context import Context
from edif_hpc.cli.launcher import launcher_of
from edif_hpc.clock import SystemClock
from edif_hpc.errors import LaunchError, SettingsError, Unavailable
from edif_hpc.launcher.runtime import Launcher, only_one

SILENT_S: Final = 90.0  #: a launcher from cron speaks once a minute
_EVERY_S, _HURRY_S = 10.0, 2.0
_PASSING = "-passing"  #: the end of the name of a launcher that ends with its command


class Rounds:
    """The rounds of one site. `launcher` is what may do them here, if anything may."""

    def __init__(
        self, api: Api, site: str, launcher: Launcher | None, tell: Callable[[str], None]
    ) -> None:
        self._api, self._site, self._tell = api, site, tell
        self._launcher = launcher and replace(launcher, name=f"{launcher.name}{_PASSING}")
        self._stack = ExitStack()
        self._last = -math.inf
        self.own = False  #: we do them

    @classmethod
    def of(cls, ctx: Context, api: Api, site: str, tell: Callable[[str], None]) -> Self:
        """Those of a site, if it has a file here and this is a login node."""
        try:
            launcher = launcher_of(ctx, site) if has_sbatch(ctx) else None
        except SettingsError:
            launcher = None
        return cls(api, site, launcher, tell)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def heard(self) -> dict[str, Any] | None:
        """The launcher of this site, if one has been heard of lately; commands like this one do not stay."""
        known: dict[str, Any] = self._api.get("/api/launchers")["launchers"]
        found = known.get(self._site)
        if found is None or found["silent_s"] > SILENT_S or found["name"].endswith(_PASSING):
            return None
        return dict(found)

    def step(self, *, hurry: bool = False) -> None:
        """A round, if it is on us and due; sooner if something waits for it."""
        launcher = self._launcher
        if launcher is None or not (self.own or self._take_over(launcher)):
            return
        now = SystemClock().monotonic()
        if now - self._last < (_HURRY_S if hurry else _EVERY_S):
            return
        self._last = now
        try:
            said = launcher.round().lines()
        except Unavailable as error:
            said = [str(error)]
        for line in said:
            self._tell(line)

    def _take_over(self, launcher: Launcher) -> bool:
        if self.heard() is not None:
            return False
        try:
            self._stack.enter_context(only_one(launcher.site))
        except LaunchError:  # another one is at work, and will be heard of
            return False
        self.own = True
        self._tell(
            f"no launcher of {self._site} was heard of; this command does its work while it waits"
        )
        return True


def has_sbatch(ctx: Context) -> bool:
    """Whether this looks like a login node."""
    return shutil.which("sbatch", path=ctx.environ.get("PATH")) is not None
