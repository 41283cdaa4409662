"""A whole edif-hpc on this machine: real processes, free ports, one folder, nothing left behind.

    with Stack(folder, models={"edif/tiny-gpt2": path}) as stack:
        stack.deploy("edif/tiny-gpt2")
        stack.launch()
        stack.wait_warm()
        ... NDIF_HOST=stack.url, NDIF_API_KEY=stack.token("ada") ...

The relay may be killed, stopped and started again: data and ports stay. Allocations are pilots, started as children (so that a
test has their pid) or through submitit. With `engine="noop"` their workers run no model (`noop_worker`).

On the way out everything is ended as an operator would, by a drain; what then still lives is killed and is a `LeftBehind`.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import httpx

from edif_hpc.domain.deployment import DEFAULT_TASK, Deployment
from edif_hpc.relay.app import init_data_dir
from edif_hpc.settings import RelaySettings
from edif_hpc.slurm.order import ContainerOrder, EngineFacts, PilotOrder, Route, write_order
from edif_hpc.slurm.submit import LocalSubmitter, Submission
from edif_hpc.testing.hub import serve_hub
from edif_hpc.testing.operator import Operator, Unexpected
from edif_hpc.testing.pilots import give, start_pilot
from edif_hpc.testing.processes import Process, processes_of
from edif_hpc.testing.raw_client import RawClient
from edif_hpc.testing.wait import wait_until

MODEL: Final = "edif/tiny-gpt2"
START_S: Final = 60.0
WARM_S: Final = 180.0
DRAIN_S: Final = 30.0
_PORTS = range(10_000, 32_000)  # below the range that outgoing connections take theirs from
_REPOSITORY = Path(__file__).parents[2]
#: Of our environment; the last ones lead to a GPU's driver and choose devices.
_KEPT = (
    "PATH", "HOME", "LANG",
    "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
)  # fmt: skip
_NOOP = "edif_hpc.testing.noop_worker"


class LeftBehind(AssertionError):
    """Processes of a stack outlived it."""


@dataclass(kw_only=True)
class Allocation:
    """One that was launched. `pilot` is its process if it was started as a child."""

    id: str
    name: str
    folder: Path
    pilot: subprocess.Popen[bytes] | None = None

    @property
    def over(self) -> bool:
        """Whether none of its processes lives."""
        if self.pilot is not None:
            self.pilot.poll()
        return not processes_of(self.folder)

    @property
    def log(self) -> str:
        """The end of what its pilot and workers said."""
        logs = [self.folder / "pilot.log", *(self.folder / "submitit").glob("*.out")]
        return "\n".join(tail(each) for each in logs if each.exists())


@dataclass(kw_only=True)
class Stack:
    """See the module's text. `settings` are those of the relay."""

    root: Path
    models: Mapping[str, Path] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    engine: EngineFacts = field(default_factory=EngineFacts)
    container: ContainerOrder | None = None  #: what workers run in
    user: str | None = None  #: whom pilots run as, if we are root
    host: str = "127.0.0.1"  #: the address of this machine that the relay listens on
    route: Route = field(default_factory=Route)  #: how allocations reach it
    term_s: float = 20.0  #: how long an allocation may take to leave after SIGTERM
    moved_clock: bool = False  #: let `clock_file` move the relay's wall clock
    relay: subprocess.Popen[bytes] | None = None
    url: str = ""
    hub: str = ""
    model_key: str = ""  #: of what was deployed last
    allocations: list[Allocation] = field(default_factory=list)
    _exit: ExitStack = field(default_factory=ExitStack)
    _ports: tuple[int, int] = (0, 0)
    _operator_token: str = ""
    _submitted: int = 0

    # -- life ----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._ports = (free_port(), free_port())
        self.url = f"http://{self.host}:{self._ports[0]}"
        if self.models:
            self.hub = self._exit.enter_context(serve_hub(self.models))
        if self.user is not None:
            self.root.chmod(0o711)
            (self.root / "cache").mkdir()
            give(self.root / "cache", self.user)
        self.clock_file.write_text("0")
        self._operator_token = init_data_dir(
            RelaySettings(data_dir=self.data_dir), operator_name="op"
        )
        try:
            self.start_relay()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        left = self.end()
        if left and error is None:
            raise LeftBehind("\n".join(f"{each.kind} {each.pid}: {each.command}" for each in left))

    def end(self) -> list[Process]:
        """End everything; returns what had to be killed."""
        for pilot in self.processes("pilot"):
            pilot.kill(signal.SIGTERM)
        with suppress(TimeoutError):  # what is left then is told and killed below
            self._wait_gone({"relay", "client"})
        self.stop_relay()
        left = self.processes()
        for each in left:
            each.kill()
        for allocation in self.allocations:
            if allocation.pilot is not None:
                allocation.pilot.wait()
        self._exit.close()
        return left

    def _wait_gone(self, but: Collection[str]) -> None:
        def gone() -> bool:
            for each in self.allocations:
                if each.pilot is not None:
                    each.pilot.poll()  # reap it
            return all(each.kind in but for each in self.processes())

        wait_until(gone, DRAIN_S, "all allocations have drained")

    # -- the relay -----------------------------------------------------------------------------------------------------

    @property
    def port(self) -> int:
        """The relay's HTTP port."""
        return self._ports[0]

    @property
    def data_dir(self) -> Path:
        """The relay's data."""
        return self.root / "relay"

    @property
    def clock_file(self) -> Path:
        """Seconds that the relay's wall clock is moved by, with `moved_clock`."""
        return self.root / "clock"

    def start_relay(self, *, failpoints: str = "", **settings: Any) -> None:
        """Start it, on the same data and ports as before, and wait until it serves."""
        self.spawn_relay(failpoints=failpoints, **settings)
        wait_until(self._serves, START_S, f"the relay serves; its log: {self.root / 'relay.log'}")

    def spawn_relay(self, *, failpoints: str = "", **settings: Any) -> None:
        """Start it, and do not wait."""
        told = {"log_level": "info", "failpoints": failpoints, **self.settings, **settings}
        http, zmq = self._ports
        told |= {"data_dir": self.data_dir, "host": self.host, "port": http}
        told |= {"worker_bind": f"tcp://{self.host}:{zmq}"}
        environ = child_environ() | {
            f"EDIF_RELAY_{name.upper()}": str(value) for name, value in told.items()
        }
        clock = [str(self.clock_file)] if self.moved_clock else []
        command = [sys.executable, "-u", "-m", "edif_hpc.testing.relay", *clock]
        with (self.root / "relay.log").open("ab") as log:
            self.relay = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                start_new_session=True,
            )

    def kill_relay(self, number: int = signal.SIGKILL) -> int:
        """Send it a signal that ends it, wait; returns its exit status."""
        if self.relay is None:
            return 0
        self.relay.send_signal(number)
        return self.wait_relay()

    def relay_ended(self) -> int | None:
        """Its exit status, if it has ended."""
        return None if self.relay is None else self.relay.poll()

    def wait_relay(self, timeout_s: float = START_S) -> int:
        """Wait until it has ended; returns its exit status, negative for a signal."""
        if self.relay is None:
            return 0
        status = self.relay.wait(timeout_s)
        self.relay = None
        return status

    def stop_relay(self) -> int:
        """End it in order."""
        return self.kill_relay(signal.SIGTERM)

    def _serves(self) -> bool:
        if self.relay is not None and self.relay.poll() is not None:
            raise Unexpected(
                f"the relay ended with {self.relay.returncode}: {tail(self.root / 'relay.log')}"
            )
        try:
            return httpx.get(f"{self.url}/ping", timeout=5.0).is_success
        except httpx.TransportError:
            return False

    # -- what an operator does -------------------------------------------------------------------------------------------

    @property
    def operator(self) -> Operator:
        """The operator API."""
        return Operator(url=self.url, token=self._operator_token)

    def token(self, name: str, **facts: Any) -> str:
        """A new token; a researcher's, unless told otherwise."""
        text: str = self.operator.post("/tokens", {"name": name, **facts})["token"]
        return text

    def deploy(self, repo_id: str = MODEL, *, name: str = "tiny", **facts: Any) -> str:
        """A new deployment; returns its model key."""
        self.operator.post("/deployments", {"repo_id": repo_id, "name": name, **facts})
        self.model_key = Deployment(
            name=name, repo_id=repo_id, revision=None, task=DEFAULT_TASK
        ).model_key.render()
        return self.model_key

    def launch(
        self,
        deployment: str = "tiny",
        *,
        engine: str = "real",
        failpoints: str = "",
        submitit: bool = False,
        slots: int | None = None,
    ) -> list[Allocation]:
        """Start what the free slots of a deployment ask for."""
        asked = {"deployment": deployment, "site": "local"} | (
            {} if slots is None else {"slots": slots}
        )
        return [
            self._start(each, engine=engine, failpoints=failpoints, submitit=submitit)
            for each in self.operator.post("/allocations", asked)["allocations"]
        ]

    def wait_warm(
        self, deployment: str = "tiny", count: int = 1, timeout_s: float = WARM_S
    ) -> None:
        """Wait until so many workers serve."""

        def warm() -> bool:
            over = [each for each in self.allocations if each.over]
            if over and len(self.allocations) == len(over):
                raise Unexpected(f"all pilots have ended; the last one said: {over[-1].log}")
            return len(self.operator.workers(deployment)) >= count

        wait_until(warm, timeout_s, f"{count} worker(s) of {deployment} are warm")

    def drain(self) -> None:
        """End all allocations in order, and wait until nothing of them lives."""
        self.operator.post("/drain", {})
        self._wait_gone({"relay", "client"})
        for each in list(self.allocations):
            self.bury(each)

    def bury(self, allocation: Allocation) -> None:
        """Do what a launcher does when the scheduler says that an allocation is gone."""
        self.allocations.remove(allocation)
        if allocation.pilot is not None:
            allocation.pilot.wait()
        self.operator.post(f"/allocations/{allocation.id}/failed", {"cause": "gone"})

    def _start(
        self, made: Mapping[str, Any], *, engine: str, failpoints: str, submitit: bool
    ) -> Allocation:
        facts = {name: getattr(self.engine, name) for name in self.engine.__struct_fields__}
        facts |= {
            "failpoints": failpoints,
            "hub_endpoint": self.hub or None,
            "hub_cache": str(self.root / "cache"),
        }
        folder = self.root / f"{made['name']}-{self._submitted}"
        self._submitted += 1
        folder.mkdir(mode=0o700)
        noop: dict[str, Any] = {"worker_module": _NOOP} if engine == "noop" else {}
        order = PilotOrder(
            name=made["name"],
            relay_url=self.url,
            join_token=made["join_token"],
            scratch=str(folder / "scratch"),
            engine=EngineFacts(**facts),
            container=self.container,
            route=self.route,
            term_s=self.term_s,
            **noop,
        )
        write_order(folder / "order", order)
        allocation = Allocation(id=made["allocation"]["id"], name=made["name"], folder=folder)
        if submitit:
            job_id = LocalSubmitter().submit(
                Submission(
                    name=allocation.name, order=folder / "order", folder=folder / "submitit"
                )
            )
        else:
            allocation.pilot = start_pilot(folder, child_environ(), self.user)
            job_id = str(allocation.pilot.pid)
        self.allocations.append(allocation)
        self.operator.post(f"/allocations/{allocation.id}/submitted", {"job_id": job_id})
        return allocation

    # -- looking -------------------------------------------------------------------------------------------------------

    def processes(self, kind: str | None = None) -> list[Process]:
        """What lives of this stack."""
        return [each for each in processes_of(self.root) if kind in (None, each.kind)]

    def client(self, name: str = "ada", **facts: Any) -> RawClient:
        """A raw client with a token of its own, for what was deployed last."""
        return RawClient(url=self.url, token=self.token(name, **facts), model_key=self.model_key)

    def client_environ(self, token: str) -> dict[str, str]:
        """The environment of an unmodified nnsight client."""
        return child_environ() | {
            "NDIF_HOST": self.url,
            "NDIF_API_KEY": token,
            "HF_ENDPOINT": self.hub,
            "HF_HOME": str(self.root / "client-cache"),
            "NNSIGHT_CONFIG": str(self.root / "nnsight.yaml"),
            "NO_COLOR": "1",
            # Sums of floats depend on how many threads share them: as many as an executor has.
            "OMP_NUM_THREADS": str(self.engine.threads or len(os.sched_getaffinity(0))),
        }


def child_environ() -> dict[str, str]:
    """What a child gets of our environment."""
    kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
    return kept | {"PYTHONPATH": str(_REPOSITORY), "EDIF_CONFIG": os.devnull}


def free_port() -> int:
    """A port of the loopback that nobody listens on, and that no outgoing connection will be given."""
    for port in random.SystemRandom().sample(_PORTS, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise OSError("200 random ports of the loopback are all taken")


def tail(file: Path, size: int = 2000) -> str:
    """The end of a log."""
    return file.read_bytes()[-size:].decode(errors="replace") if file.exists() else "(no log)"
