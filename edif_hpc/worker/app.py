"""The worker's main: `python -m edif_hpc.worker.app ORDER PILOT_PID NONCE`.

SIGTERM means: drain. So do the scheduler's warnings, which may reach every process of a job. SIGUSR1 and SIGHUP come from the
pilot when the time is over: give back what runs, because the walltime ends or because the scheduler takes the node.

PILOT_PID is 0 in a container, whose processes cannot see the pilot; there the pilot holds the other end of standard input.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from edif_hpc.clock import SystemClock
from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.lease import LeaseEnd
from edif_hpc.errors import EdifError
from edif_hpc.failpoints import Failpoints
from edif_hpc.slurm.devices import driver_variables, vendor_here
from edif_hpc.slurm.order import (
    SERVED,
    WorkerExit,
    WorkerOrder,
    read_worker_order,
)
from edif_hpc.telemetry import set_up_logging
from edif_hpc.wire.sockets import Dealer, KeyPair
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import EngineSpec, Level
from edif_hpc.worker.ports import Engine as EnginePort
from edif_hpc.worker.runtime import WorkerRuntime
from edif_hpc.worker.transfer import Transfer

_PR_SET_PDEATHSIG = 1
_TIME_IS_OVER = MappingProxyType(
    {signal.SIGUSR1: LeaseEnd.WALLTIME, signal.SIGHUP: LeaseEnd.PREEMPTED}
)

#: With a copy of the weights in each executor, and a driver that has to let go of a killed one.
_READY_S = 600.0
#: Where the holder of shared weights does that, it also restores what was changed.
_REAP_S = MappingProxyType({"auto": 30.0, "private": 30.0, "shared": 180.0})

MakeEngine = Callable[[Mapping[str, Any]], EnginePort]


def engine_spec(deployment: Mapping[str, Any], order: WorkerOrder) -> EngineSpec:
    """What the relay says to serve, with what the site says about where it runs."""
    facts = order.engine
    source = deployment["source"] or deployment["repo_id"]
    on_device = deployment["device"] != "cpu"
    spec = EngineSpec(
        model_key=deployment["model_key"],
        more_tasks=tuple(deployment["more_tasks"]),
        source=source,
        revision=deployment["revision"],
        adapters=tuple(Adapter(**each) for each in deployment["adapters"]),
        dtype=deployment["dtype"],
        device=deployment["device"],
        devices=max(1, deployment["gpus"]) if on_device else 1,
        weights=deployment["weights"],
        driver=_driver() if on_device else {},
        threads=facts.threads or len(os.sched_getaffinity(0)),
        ready=facts.ready,
        scratch=Path(order.scratch) / "engine",
        scratch_bytes=deployment["scratch_bytes"],
        floor=Level(deployment["isolation_floor"]),
        ceiling=Level(facts.isolation_ceiling),
        hub_endpoint=facts.hub_endpoint,
        hub_cache=Path(facts.hub_cache) if facts.hub_cache else None,
        hub_token=facts.hub_token,
        stores=facts.stores,
        libraries=facts.libraries,
        proxy=order.proxy,
    )
    if not on_device:
        return spec
    return replace(spec, ready_timeout_s=_READY_S, reap_timeout_s=_REAP_S[spec.weights])


def real_engine(order: WorkerOrder) -> MakeEngine:
    """The engine that runs nnsight."""
    return lambda deployment: Engine(engine_spec(deployment, order))


def _driver() -> dict[str, str]:
    return driver_variables(os.environ, vendor_here())


async def _serve(
    order: WorkerOrder, make_engine: MakeEngine, nonce: str, *, follow_input: bool
) -> WorkerExit:
    scratch = Path(order.scratch)
    runtime = WorkerRuntime(
        make_engine=make_engine,
        transfer=Transfer(proxy=order.proxy),
        scratch=scratch,
        clock=SystemClock(),
        failpoints=Failpoints.parse(order.engine.failpoints),
        nonce=nonce,
    )
    dealer = Dealer(
        endpoint=order.endpoint,
        server_key=order.server_key,
        keys=KeyPair(public=order.public_key, secret=order.secret_key),
        on_batch=runtime.received,
        on_event=runtime.saw,
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        loop.add_signal_handler(number, runtime.drain, number.name)
    for number, end in _TIME_IS_OVER.items():
        loop.add_signal_handler(number, runtime.cut_short, str(end), end)
    if follow_input:
        loop.add_reader(sys.stdin.fileno(), _input_closed, runtime.drain)
    code = await runtime.run(dealer)
    # The loop gives its handlers back when it closes, and what it handled would kill a process that has all but left.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, *_TIME_IS_OVER})
    (scratch / SERVED).write_text(str(runtime.requests))
    return code


def _input_closed(drain: Callable[[str], None]) -> None:
    """Nothing is ever written there, so what there is to read is its end: the pilot is gone."""
    asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
    drain("the pilot is gone")


def main(argv: list[str], engine: Callable[[WorkerOrder], MakeEngine] = real_engine) -> int:
    """Run one worker; the exit codes are `WorkerExit`. The pilot names itself and this process (`nonce`)."""
    path, pilot, nonce = argv[1:]
    if int(pilot):
        _follow(int(pilot))
    order = read_worker_order(Path(path))
    set_up_logging(order.engine.log_level, process="worker")
    shutil.rmtree(order.scratch, ignore_errors=True)
    Path(order.scratch).mkdir(parents=True, exist_ok=True, mode=0o700)  # a mount stays
    try:
        serving = _serve(order, engine(order), nonce, follow_input=not int(pilot))
        return int(asyncio.run(serving))
    except EdifError as error:
        sys.stderr.write(f"worker: {error}\n")
        return 1


def _follow(pilot: int) -> None:
    """Be sent SIGTERM, that is drain, when the pilot dies; it may have died already."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != pilot:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
