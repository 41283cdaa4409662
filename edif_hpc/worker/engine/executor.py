"""The process that runs one request and is thrown away.

It begins as a copy of the zygote. Before it says `Ready` it locks itself up (`jail`) and only then
starts threads, opens the weights on a device if there is one, and computes: if there is time, it
rehearses the self-test, so that what a first forward sets up is not part of a request. Then it waits.
When the request comes it runs it (`attempt`), says `Done` or `Broken`, and ends without running anything
that the request may have left to be run at exit.

The worker believes nothing that comes from here beyond its form: everything after the request has
begun may be the researcher's doing.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import NoReturn

import torch

from edif_hpc.errors import EdifError, EngineError
from edif_hpc.worker.engine import environment
from edif_hpc.worker.engine.house import House as House
from edif_hpc.worker.engine.messages import (
    TO_EXECUTOR,
    Fork,
    Ready,
    Refused,
    Run,
)
from edif_hpc.worker.engine.model import device as devices
from edif_hpc.worker.engine.model import kernels
from edif_hpc.worker.engine.protocol import FROM_EXECUTOR_BYTES, Channel
from edif_hpc.worker.engine.request.attempt import answer, limit
from edif_hpc.worker.engine.request.attempt import (
    rehearse as rehearse,
)  # an executor does it before it is ready
from edif_hpc.worker.engine.request.voice import Voice
from edif_hpc.worker.engine.walls import memory
from edif_hpc.worker.engine.walls.jail import Jail
from edif_hpc.worker.engine.weights import base as weights

SOCKET_FD, RESULT_FD = 3, 4
FIRST_FREE_FD, LAST_FD = 5, 1 << 20


def folder_of(scratch: Path, executor: int) -> Path:
    """Return the folder that an executor may write in."""
    return scratch / f"executor-{executor}"


def main(house: House, order: Fork, fds: Sequence[int]) -> NoReturn:
    """Live the whole life of an executor; `fds` are its socket and its result's file."""
    status = 1
    try:
        folder = folder_of(house.scratch, order.executor)
        steps = _locked_up(house.jail, folder, fds[0])
        os.environ.update(environment.of_executor(folder, house.jail.layers.level))  # noqa: TID251 - written, for libraries
        if house.jail.layers.namespaces:
            # As process 1 it takes no signal but SIGKILL from outside. Its children must be able to end: pools send them SIGTERM.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        channel = _keep_only(fds)
        house, ready = _get_ready(house, order, steps, channel)
        channel.send(ready)
        _serve(house, channel)
        status = 0
    finally:
        os._exit(status)


def _locked_up(jail: Jail, folder: Path, sock: int) -> list[str]:
    """Put up the walls; what stands in the way is told on the descriptor `sock` before it ends this process."""
    try:
        return jail.enter(folder)
    except Exception as error:
        _speaking(sock).send(_refusal(error))
        raise


def _get_ready(
    house: House, order: Fork, steps: list[str], channel: Channel
) -> tuple[House, Ready]:
    """Start threads, open the weights, rehearse; what stands in the way is told before it ends this process."""
    try:
        torch.set_num_threads(house.threads)
        house, ready = _opened(house, order, steps)
        if order.rehearse:
            rehearse(house, next(iter(house.selftests)), RESULT_FD)
            _settle(house)
        if house.devices and not ready.free_bytes:
            ready = replace(ready, free_bytes=[each.memory()[0] for each in house.devices])
    except Exception as error:
        channel.send(_refusal(error))
        raise
    has = memory.held(Path("/proc/self"))
    shared = sum(memory.shared(Path("/proc/self")).values()) if house.devices else 0
    return house, replace(
        ready,
        cpu_s=process_time(),
        private_bytes=has.private,
        mapped_bytes=has.mapped,
        shared_bytes=shared,
    )


def _opened(house: House, order: Fork, steps: list[str]) -> tuple[House, Ready]:
    """Have the weights where they are computed with; the first executor finds out what holds for all."""
    if not house.devices:
        return house, Ready(steps=steps)
    devices.show(house.driver)
    name = devices.start(house.devices)
    own = [each.torch for each in house.devices]
    modules = {task: model._module for task, model in house.models.items()}  # noqa: SLF001 - as nnsight's own helpers do
    spreads = [house.placements[task].spread(each) for task, each in modules.items()]
    free = _make_room(house, order, weights.sizes(spreads)) if house.holder.copies else []
    house.holder.open(spreads, own)
    for task, module in modules.items():
        house.placements[task].connect(module, own)
        if getattr(house.models[task], "pipeline", None) is not None:
            house.models[task].pipeline.device = own[0]
    graded = order.graded
    if not order.free_bytes:
        graded = [t for t, each in house.models.items() if kernels.differ_with_gradients(each)]
    ready = Ready(steps=steps, device_name=name, free_bytes=free, graded=graded)
    return replace(house, graded=frozenset(graded)), ready


def _make_room(house: House, order: Fork, needed: Mapping[int, int]) -> list[int]:
    """Wait until a copy of the weights fits, and what others had is back; return what is free on each device."""
    before = order.free_bytes or [0] * len(house.devices)
    return [
        devices.wait_for_memory(each, needed.get(index, 0), before=before[index])
        for index, each in enumerate(house.devices)
    ]


def _settle(house: House) -> None:
    """Make sure that a rehearsal has left the devices usable.

    Weights that are shared may hold anything while somebody else runs. What comes of them is thrown away, but a kernel that
    failed on them, on an index out of bounds for one, leaves this process without its device.
    """
    for each in house.devices:
        each.settle()


def _keep_only(fds: Sequence[int]) -> Channel:
    """Close every descriptor but this executor's own two; the standard ones lead nowhere."""
    os.dup2(fds[0], SOCKET_FD)
    os.dup2(fds[1], RESULT_FD)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.closerange(FIRST_FREE_FD, LAST_FD)
    return _speaking(SOCKET_FD)


def _speaking(sock: int) -> Channel:
    """The channel to the worker on a descriptor."""
    return Channel(socket.socket(fileno=sock), accepts=TO_EXECUTOR, send_limit=FROM_EXECUTOR_BYTES)


def _refusal(error: Exception) -> Refused:
    text = str(error) if isinstance(error, EdifError) else f"{type(error).__name__}: {error}"
    return Refused(code=EngineError.code, message=text[:4000])


def _serve(house: House, channel: Channel) -> None:
    message, fds = channel.receive()
    if not isinstance(message, Run):
        raise TypeError(f"an executor is sent {type(message).__name__} instead of Run")
    limit(message)
    voice = Voice(channel)
    voice.end(answer(house, message, fds, voice, RESULT_FD))
