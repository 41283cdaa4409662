"""The process that runs one request and is thrown away.

It begins as a copy of the zygote. Before it says `Ready` it locks itself up (`jail`) and only then
starts threads, opens the weights on a device if there is one, and computes: if there is time, it
rehearses the self-test, so that what a first forward sets up is not part of a request. Then it waits.
When the request comes it sets all random generators by the seed that comes along, because all copies
of the zygote would otherwise draw the same numbers; runs it; writes the result; says `Done` or `Broken`;
and ends without running anything that the request may have left to be run at exit.

The worker believes nothing that comes from here beyond its form: everything after the request has
begun may be the researcher's doing.
"""

from __future__ import annotations

import linecache
import os
import random
import resource
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from nnsight.tracing.globals import BLOCKS, SOURCES

from edif_hpc.domain.deployment import parse_model_key
from edif_hpc.errors import EdifError, EngineError, NotPermitted, TooLarge
from edif_hpc.worker.engine import classes, environment, fidelity, kernels, memory, saves, weights
from edif_hpc.worker.engine import device as devices
from edif_hpc.worker.engine.console import Allowance, Console
from edif_hpc.worker.engine.jail import Jail
from edif_hpc.worker.engine.messages import (
    TO_EXECUTOR,
    Broken,
    Done,
    Fork,
    Log,
    Message,
    Ready,
    Refused,
    Run,
    Written,
)
from edif_hpc.worker.engine.protocol import FROM_EXECUTOR_BYTES, Channel, encode
from edif_hpc.worker.engine.values import INLINE_BYTES, FailureKind, Plain

SOCKET_FD, RESULT_FD = 3, 4
FIRST_FREE_FD, LAST_FD = 5, 1 << 20
#: Kept back from the request, so that its failure for want of memory can still be told.
RESERVE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class House:
    """What the zygote prepared and every executor inherits."""

    #: By task; the first one is the deployment's first.
    models: Mapping[str, Any]
    #: Of a task that lacks some: the names of weights that the checkpoint does not have.
    random_weights: Mapping[str, list[str]]
    #: Tasks whose numbers are those of a local run only when gradients are tracked.
    graded: frozenset[str]
    #: The folder of each adapter that a request may have attached.
    adapters: Mapping[str, str]
    jail: Jail
    threads: int
    scratch: Path
    #: By model key, in the order of `models`.
    selftests: Mapping[str, bytes]
    consoles: tuple[Console, Console]
    holder: weights.Holder
    #: What executors compute on, if not on the CPU.
    device: devices.Device | None
    #: What tells its driver which devices are ours.
    driver: Mapping[str, str]

    def task(self, model_key: str) -> str:
        """Return the task that a key names; the first one for no key.

        Raises:
            NotPermitted: it is not served.
        """
        task = parse_model_key(model_key).task if model_key else next(iter(self.models))
        if task not in self.models:
            raise NotPermitted(
                f"the task {task!r} is not served here; served: {', '.join(self.models)}"
            )
        return task


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no result."""

    kind: FailureKind
    message: str
    lacked_gradients: bool = False


def folder_of(scratch: Path, executor: int) -> Path:
    """Return the folder that an executor may write in."""
    return scratch / f"executor-{executor}"


def main(house: House, order: Fork, fds: Sequence[int]) -> NoReturn:
    """Live the whole life of an executor; `fds` are its socket and its result's file."""
    status = 1
    try:
        folder = folder_of(house.scratch, order.executor)
        steps = house.jail.enter(folder)
        os.environ.update(environment.places(folder))  # noqa: TID251 - written, for libraries
        channel = _keep_only(fds)
        house, ready = _get_ready(house, order, steps, channel)
        channel.send(ready)
        _serve(house, channel)
        status = 0
    finally:
        os._exit(status)


def _get_ready(
    house: House, order: Fork, steps: list[str], channel: Channel
) -> tuple[House, Ready]:
    """Start threads, open the weights, rehearse; what stands in the way is told before it ends this process."""
    try:
        torch.set_num_threads(house.threads)
        house, ready = _opened(house, order, steps)
        if order.rehearse:
            rehearse(house, next(iter(house.selftests)), RESULT_FD)
    except Exception as error:
        text = str(error) if isinstance(error, EdifError) else f"{type(error).__name__}: {error}"
        channel.send(Refused(code=EngineError.code, message=text[:4000]))
        raise
    return house, ready


def _opened(house: House, order: Fork, steps: list[str]) -> tuple[House, Ready]:
    """Have the weights where they are computed with; the first executor finds out what holds for all."""
    device = house.device
    if device is None:
        return house, Ready(steps=steps)
    devices.show(house.driver)
    name = device.start()
    modules = [model._module for model in house.models.values()]  # noqa: SLF001 - as nnsight's own helpers do
    free = devices.wait_for_memory(device, weights.size(modules), before=order.free_bytes)
    house.holder.open(modules, device.torch)
    for model in house.models.values():
        if getattr(model, "pipeline", None) is not None:
            model.pipeline.device = device.torch
    graded = order.graded
    if not order.free_bytes:
        graded = [t for t, each in house.models.items() if kernels.differ_with_gradients(each)]
    ready = Ready(steps=steps, device_name=name, free_bytes=free, graded=graded)
    return replace(house, graded=frozenset(graded)), ready


def _keep_only(fds: Sequence[int]) -> Channel:
    """Close every descriptor but this executor's own two; the standard ones lead nowhere."""
    os.dup2(fds[0], SOCKET_FD)
    os.dup2(fds[1], RESULT_FD)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    os.closerange(FIRST_FREE_FD, LAST_FD)
    return Channel(
        socket.socket(fileno=SOCKET_FD), accepts=TO_EXECUTOR, send_limit=FROM_EXECUTOR_BYTES
    )


def rehearse(house: House, key: str, result_fd: int) -> None:
    """Answer the self-test of a model key for the side effects, to nobody, and forget that it was."""
    run = Run(
        blob=house.selftests[key],
        compress=True,
        env={},
        model_key=key,
        seed=0,
        gradients=False,
        memory_bytes=0,
        result_bytes=INLINE_BYTES,
        log_bytes=0,
        log_lines=0,
    )
    memory.data_bytes()
    encode(_answer(house, run, [], lambda _: None, result_fd), FROM_EXECUTOR_BYTES)
    for console in house.consoles:
        console.connect(None)
    SOURCES.clear()
    BLOCKS.clear()
    linecache.clearcache()


def _serve(house: House, channel: Channel) -> None:
    message, fds = channel.receive()
    if not isinstance(message, Run):
        raise TypeError(f"an executor is sent {type(message).__name__} instead of Run")
    _limit(message)
    channel.send(_answer(house, message, fds, channel.send, RESULT_FD))


def _answer(
    house: House, run: Run, fds: Sequence[int], send: Callable[[Message], None], result_fd: int
) -> Done | Broken:
    """Run a request to its end; LOG lines and the progress of the result go out by `send`."""
    meta: dict[str, Plain] = {
        "seed": run.seed,
        "model_key": run.model_key,
        "isolation": str(house.jail.layers.level),
        "threads": house.threads,
        "max_mem_by_gpu": {},
    }
    if house.device is not None:
        house.device.begin()
    _reseed(run.seed)
    allowance = Allowance(
        lambda text: send(Log(text=text)), max_bytes=run.log_bytes, max_lines=run.log_lines
    )
    store = saves.Store(
        result_fd,
        inline_bytes=INLINE_BYTES,
        max_bytes=run.result_bytes,
        report=lambda size: send(Written(size=size)),
    )
    for console in house.consoles:
        console.connect(allowance.line)
    failure = _attempt(house, run, fds, store, meta)
    for console in house.consoles:
        console.finish()
    if house.device is not None:
        meta["max_mem_by_gpu"] = {"0": house.device.peak_bytes()}
    meta["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if failure is None:
        return Done(inline=store.inline, size=store.size, meta=meta)
    return Broken(
        kind=str(failure.kind),
        message=failure.message,
        lacked_gradients=failure.lacked_gradients,
        meta=meta,
    )


def _attempt(
    house: House, run: Run, fds: Sequence[int], store: saves.Store, meta: dict[str, Plain]
) -> Failure | None:
    """Run the request and write its result; return why it failed, if it did."""
    gradients = run.gradients
    try:
        blob = run.blob if run.blob is not None else _read(fds[0])
        payload = fidelity.unpack(blob, compress=run.compress)
        task = house.task(run.model_key)
        model = house.models[task]
        if task in house.random_weights:
            meta["random_weights"] = [*house.random_weights[task]]
        meta |= fidelity.apply_env(model, run.env, house.adapters)
        tracer = fidelity.restore(model, payload)
        sent = classes.sent()
        gradients = gradients or task in house.graded or fidelity.wants_gradients(payload, tracer)
        meta["gradients"] = gradients
        saved = fidelity.execute(model, tracer, gradients=gradients)
        saves.write(saved, store, compress=run.compress, sent=sent)
    except TooLarge as error:
        return Failure(kind=FailureKind.LIMIT, message=str(error))
    except (NotPermitted, EdifError) as error:
        return Failure(kind=FailureKind.USER, message=str(error))
    except BaseException as error:  # noqa: BLE001 - also SystemExit: whatever the block raises is told
        _release_reserve()
        kind = fidelity.judge(error)
        scarce = kind is FailureKind.OOM and house.device is not None and house.device.lacks(error)
        told = f"\n\n{devices.scarcity(house.device)}" if scarce and house.device else ""
        return Failure(
            kind=kind,
            message=fidelity.explain(error) + told,
            lacked_gradients=not gradients and fidelity.lacked_gradients(error),
        )
    return None


def _read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _reseed(seed: int) -> None:
    """Set all random generators by `seed`."""
    random.seed(seed)
    np.random.seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
    else:  # the rest of `manual_seed` notes down, at some cost, what to do once there is a GPU
        torch.default_generator.manual_seed(seed)


def _limit(run: Run) -> None:
    """Limit what the request may use of memory and disk."""
    most = memory.data_bytes() + run.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most + RESERVE_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (run.result_bytes, run.result_bytes))


def _release_reserve() -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    sys.stdout.flush()
