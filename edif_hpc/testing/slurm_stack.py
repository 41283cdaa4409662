"""A whole edif-hpc over a real Slurm: a relay here, a launcher as an ordinary user, pilots and workers in Slurm's jobs.

    with SlurmStack(root=folder, cluster=cluster) as site:
        site.stack.deploy(executors=8)
        site.start_launcher()
        site.up(slots=5, walltime_min=2)
        site.wait_warm(5)

Queues here are empty and workers start in seconds, so the relay is told to expect that (`SETTINGS`): an operator of such a site
would set the same. Jobs last for minutes because Slurm counts in minutes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from edif_hpc.errors import LaunchError
from edif_hpc.slurm.order import EngineFacts
from edif_hpc.slurm.site import Container, Site
from edif_hpc.testing.operator import Unexpected
from edif_hpc.testing.slurm import SlurmCluster
from edif_hpc.testing.stack import Stack, child_environ, tail
from edif_hpc.testing.wait import wait_until

SETTINGS: Final[Mapping[str, Any]] = {
    "lease_s": 10.0,
    "heartbeat_s": 0.5,
    "poll_hold_s": 5.0,
    "first_wait_s": 5.0,
    "first_warmup_s": 10.0,
    "lead_margin_s": 30.0,
    "end_margin_s": 20.0,
    "submits_per_10_min": 1000,
}
START_S: Final = 90.0
_STOP_S: Final = 30.0


@dataclass(kw_only=True)
class SlurmStack:
    """See the module's text. `root` has to be reachable by everybody."""

    root: Path
    cluster: SlurmCluster
    models: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineFacts = field(default_factory=EngineFacts)
    container: Container | None = None
    pilots_submit: bool = False  #: their successors, themselves; else the launcher does it all
    stack: Stack = field(init=False)
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _token: str = ""
    _ending: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        self.root.mkdir(mode=0o755)
        self.stack = Stack(
            root=self.root / "stack", models=self.models, settings={**SETTINGS, **self.settings}
        )
        self._ending.enter_context(self.stack)
        self._token = self.stack.token("launcher", role="launcher")
        state = self.root / "state"
        state.mkdir(mode=0o700)
        os.chown(state, *self.cluster.ids)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._ending:
            for each in self.launchers:
                self.end_launcher(each)
            if self.stack.relay is not None:
                self.stack.operator.post("/drain", {})  # else what is cancelled has successors
            self.cluster.admin("scancel", "--user", self.cluster.user)
            wait_until(lambda: not self.jobs(), _STOP_S, "all jobs have ended")

    # -- launchers -------------------------------------------------------------------------------------------------------

    @property
    def site(self) -> Site:
        """The cluster as the site file describes it."""
        return msgspec.structs.replace(
            self.cluster.site(),
            state_dir=self.root / "state",
            scratch=str(self.root / "state" / "scratch"),
            compute_may_submit=self.pilots_submit,
            engine=self._engine,
            container=self.container,
        )

    @property
    def log(self) -> str:
        """What launchers, relay and pilots said last."""
        logs = [self.root / "launcher.log", self.stack.root / "relay.log"]
        logs += sorted((self.root / "state").glob("*/*_log.out"))[-3:]
        return "\n".join(f"{each.name}: {tail(each)}" for each in logs)

    def start_launcher(
        self,
        name: str = "login1",
        *,
        noop: bool = True,
        failpoints: str = "",
        site: Site | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start one as the ordinary user: the test's own with workers without a model, or the command line's."""
        file = self.root / f"{name}.toml"
        file.write_text(site_toml(site or self.site))
        arguments = (
            ["edif_hpc.testing.launcher", str(file), name, "1"]
            if noop
            else ["edif_hpc.cli.main", "launcher", "run", "--site", str(file), "--interval", "1s"]
        )
        environ = child_environ() | self.cluster.environ
        environ |= {"EDIF_RELAY": self.stack.url, "EDIF_TOKEN": self._token}
        environ |= {"EDIF_LAUNCHER_FAILPOINTS": failpoints} if failpoints else {}
        with (self.root / "launcher.log").open("ab") as log:
            started = subprocess.Popen(
                [*self.cluster.run.prefix, sys.executable, "-u", "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )
        self.launchers.append(started)
        return started

    def end_launcher(
        self, launcher: subprocess.Popen[bytes], number: int = signal.SIGTERM
    ) -> None:
        """End one with a signal."""
        launcher.send_signal(number)
        launcher.wait(_STOP_S)

    # -- slots -----------------------------------------------------------------------------------------------------------

    def up(
        self,
        deployment: str = "tiny",
        *,
        slots: int,
        walltime_min: int,
        gpu: str = "a6000",
        gpus: int = 1,
    ) -> None:
        """Want a deployment up at this site."""
        body = {"deployment": deployment, "site": self.site.name, "slots": slots, "gpus": gpus}
        self.stack.operator.post("/allocations", body | {"gpu": gpu, "walltime_min": walltime_min})

    def slot(self, index: int = 0, deployment: str = "tiny") -> dict[str, Any]:
        """What the relay says of a slot."""
        found: dict[str, Any] = self.stack.operator.get(f"/slots/{deployment}/{index}")
        return found

    def generations(self, index: int = 0, deployment: str = "tiny") -> list[dict[str, Any]]:
        """The generations of a slot, the oldest first."""
        found: list[dict[str, Any]] = self.slot(index, deployment)["generations"]
        return found

    def wait_warm(self, count: int = 1, deployment: str = "tiny") -> None:
        """Wait until so many workers serve."""
        try:
            wait_until(
                lambda: len(self.stack.operator.workers(deployment)) >= count,
                START_S,
                f"{count} worker(s) are warm",
            )
        except TimeoutError as error:
            slots = json.dumps(self.slot(0, deployment), indent=1)
            raise Unexpected(f"{error}\n{slots}\n{self.log}") from error

    def jobs(self) -> dict[str, str]:
        """Slurm's own list: ids and names of the jobs that are not over."""
        try:
            said = self.cluster.admin("squeue", "-h", "-o", "%i|%j")
        except LaunchError:  # the controller is away
            return {"": "unknown"}
        return dict(line.split("|", 1) for line in said.splitlines())

    @property
    def _engine(self) -> EngineFacts:
        facts = {"hub_endpoint": self.stack.hub or None}
        cache = {"hub_cache": str(self.root / "state" / "cache")} if self.stack.hub else {}
        return msgspec.structs.replace(self.engine, **facts, **cache)


def site_toml(site: Site) -> str:
    """A site as its operator would have written it."""
    facts = msgspec.to_builtins(site, enc_hook=str)
    tables = {name: facts.pop(name) for name in ("container", "engine", "limits", "gpus")}
    gpus = tables.pop("gpus")
    parts = [_table(facts)]
    parts += [f"[{name}]\n{_table(each)}" for name, each in tables.items() if each]
    parts += [f"[gpus.{name}]\n{_table(each)}" for name, each in gpus.items()]
    return "\n".join(parts)


def _table(facts: Mapping[str, Any]) -> str:
    return "".join(
        f"{name} = {_value(value)}\n" for name, value in facts.items() if value is not None
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{json.dumps(key)} = {_value(each)}" for key, each in value.items())
        return f"{{ {inner} }}"
    return json.dumps(value)  # strings, numbers, truth and lists look the same in TOML
