"""The process that holds the imports and the weights, and forks executors.

It is executed fresh, with an environment built for it and no descriptor but one, so that nothing of the
worker's (keys, sockets) can be inherited by what it forks. It loads the models once, rehearses their
self-tests, and from then on does three things: forks an executor on order, reaps those that ended, and
says so. No request reaches it, and it computes with one thread only: a child of a process that has
computed with more hangs in the thread library.

It dies with the worker, and every executor dies with it.

    python -m edif_hpc.worker.engine.zygote CONTROL_FD WORKER_PID
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from edif_hpc.errors import EdifError, EngineError
from edif_hpc.worker.engine import environment
from edif_hpc.worker.engine.messages import (
    TO_ZYGOTE,
    Exited,
    Fork,
    Forked,
    Load,
    Loaded,
    Loading,
    Message,
    Refused,
    Settled,
)
from edif_hpc.worker.engine.model import room, stores, versions
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, Channel, PeerClosed
from edif_hpc.worker.engine.request.console import Console
from edif_hpc.worker.engine.values import Level
from edif_hpc.worker.engine.walls import jail as jails
from edif_hpc.worker.engine.walls import probing

if TYPE_CHECKING:
    from edif_hpc.worker.engine.executor import House

LAST_FD = 1 << 20
#: A scheduler's warnings may reach all processes of a job. What they mean is the worker's to decide: it ends us.
WARNINGS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def main(arguments: list[str], jail: Callable[[jails.Layers], jails.Jail] = jails.Jail) -> int:
    """Load, then serve until the worker closes the control socket; `jail` puts up the walls that were found to hold."""
    control_fd, worker_pid = int(arguments[0]), int(arguments[1])
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)  # and in all that is forked from here
    os.closerange(3, control_fd)
    os.closerange(control_fd + 1, LAST_FD)
    channel = Channel(
        socket.socket(fileno=control_fd), accepts=TO_ZYGOTE, send_limit=FROM_ZYGOTE_BYTES
    )
    try:
        house, loaded = _prepare(_load(channel), channel, worker_pid, jail)
        channel.send(loaded)
        Zygote(house, channel).serve()
    except PeerClosed:
        return 0
    except EdifError as error:
        channel.send(Refused(code=error.code, message=str(error)))
    except Exception as error:  # noqa: BLE001 - a process main: whatever stops it is reported
        channel.send(
            Refused(code=EngineError.code, message=f"{type(error).__name__}: {error}"[:4000])
        )
    return 1


def _load(channel: Channel) -> Load:
    message, _ = channel.receive()
    if not isinstance(message, Load):
        raise EngineError(f"a zygote is sent {type(message).__name__} before Load")
    return message


def _prepare(
    load: Load,
    channel: Channel,
    worker_pid: int,
    make_jail: Callable[[jails.Layers], jails.Jail],
) -> tuple[House, Loaded]:
    """Go from a bare interpreter to loaded models that are cheap and safe to fork."""
    began = monotonic()
    scratch = Path(load.scratch)
    jails.follow(os.pidfd_open(worker_pid))
    layers, missing = probing.probe(scratch, ceiling=Level(load.ceiling), floor=Level(load.floor))
    jail = make_jail(layers)
    # Before the imports: handlers of loggers keep the stream that they find then.
    sys.stdout, sys.stderr = consoles = Console(aside=sys.stdout), Console(aside=sys.stderr)
    report = _reporter(channel)
    report("importing", 0, 0)
    versions.check()
    stores.admit(load)
    from edif_hpc.worker.engine.executor import House, rehearse  # noqa: PLC0415
    from edif_hpc.worker.engine.model import device as devices  # noqa: PLC0415 - heavy
    from edif_hpc.worker.engine.model import kernels, loading, selftest  # noqa: PLC0415
    from edif_hpc.worker.engine.request import libraries  # noqa: PLC0415
    from edif_hpc.worker.engine.walls import memory  # noqa: PLC0415
    from edif_hpc.worker.engine.weights import ways  # noqa: PLC0415

    own = devices.of(load.device, load.devices)
    loading.be_one_thread()
    libraries.prepare()
    loading.import_peft(load)
    room.check(Path(load.folder), dtype=load.dtype, free=room.free_bytes())
    report("loading", 0, 0)
    keeping = ways.Keeping(load, own)
    models: dict[str, Any] = {}
    selftests: dict[str, bytes] = {}
    size = 0
    for key, model in loading.load_models(load):
        size += keeping.holder.take(
            model._module,  # noqa: SLF001 - as nnsight's own helpers do
            lambda done, total: report("placing", done, total),
        )
        models[key.task], selftests[key.render()] = model, selftest.capture(model)
    info = loading.describe(models, load)
    readable = {*loading.readable(load), environment.home(scratch), *map(Path, load.stores)}
    report("placing", 0, 0)
    keeping.prepare(models, layers.level, sorted(readable))
    gpu = bool(own) and own[0].gpu
    jail.shut(scratch, readable, gpu=gpu, scratch_bytes=load.scratch_bytes)
    keeping.prove(jail, scratch)
    tempfile.tempdir = os.curdir
    # On a device they differ for other models than here; there the first executor tries.
    tried = {} if own else models
    house = House(
        models=models,
        random_weights=info["random_weights"],
        graded=frozenset(t for t, each in tried.items() if kernels.differ_with_gradients(each)),
        adapters=load.adapters,
        jail=jail,
        threads=load.threads,
        scratch=scratch,
        selftests=selftests,
        consoles=consoles,
        holder=keeping.holder,
        devices=own,
        placements=keeping.placements,
        driver=load.driver,
        stores=tuple(load.stores),
    )
    # What a first forward imports, caches and compiles, every executor finds done.
    for test in selftests:
        rehearse(house, test, os.memfd_create("rehearsal", os.MFD_CLOEXEC))
    memory.settle()
    info |= {
        "device": load.device,
        "weights": keeping.holder.way,
        "isolation": {
            "level": str(layers.level),
            "steps": [name for name, _ in jail.steps(scratch)],
            "missing": [*missing, *keeping.missing],
        },
        "stores": load.stores,
        "libraries": load.libraries,
        "weights_bytes": size,
        "load_s": round(monotonic() - began, 3),
    }
    return house, Loaded(info=info, selftests=selftests)


def _reporter(channel: Channel) -> Callable[[str, int, int], None]:
    """Return what tells the worker how far loading is: each stage, and each hundredth of it."""
    last: tuple[str, int] = ("", 0)

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        step = (stage, done * 100 // total if total else 0)
        if step != last:
            last = step
            channel.send(Loading(stage=stage, done=done, total=total))

    return report


class Zygote:
    """Forks on order and reaps; one loop, no thread."""

    def __init__(self, house: House, channel: Channel) -> None:
        self._house = house
        self._channel = channel
        #: By the descriptor that stands for the process: the executor's number and its pid.
        self._alive: dict[int, tuple[int, int]] = {}
        #: What the first executor found free on each device.
        self._free: list[int] = []
        self._poll = select.poll()
        self._poll.register(channel.fileno(), select.POLLIN)
        if house.holder.fileno() >= 0:
            self._poll.register(house.holder.fileno(), select.POLLIN)

    def serve(self) -> None:
        """Serve until the worker closes the control socket, which raises `PeerClosed`."""
        while True:
            for fd, _ in self._poll.poll():
                if fd == self._house.holder.fileno():
                    raise self._house.holder.ended()
                if fd in self._alive:
                    self._reap(fd)
                else:
                    message, fds = self._channel.receive()
                    self._order(message, fds)

    def _order(self, message: Message, fds: list[int]) -> None:
        if not isinstance(message, Fork) or len(fds) != 2:
            raise EngineError(f"a zygote is sent {type(message).__name__} with {len(fds)} fds")
        self._free = self._free or message.free_bytes
        pid = self._house.jail.fork()
        if pid == 0:
            from edif_hpc.worker.engine import executor  # noqa: PLC0415 - the parent never needs it

            executor.main(self._house, message, fds)
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(pid)
        self._alive[pidfd] = (message.executor, pid)
        self._poll.register(pidfd, select.POLLIN)
        self._channel.send(Forked(executor=message.executor, pid=pid), [pidfd])

    def _reap(self, pidfd: int) -> None:
        executor, pid = self._alive.pop(pidfd)
        self._poll.unregister(pidfd)
        os.close(pidfd)
        _, status, usage = os.wait4(pid, 0)
        settled = self._settled(executor)
        self._channel.send(
            Exited(
                executor=executor,
                status=status,
                cpu_s=usage.ru_utime + usage.ru_stime,
                peak_rss_bytes=usage.ru_maxrss * 1024,
                restored=settled.restored,
                restore_s=settled.seconds,
            )
        )

    def _settled(self, executor: int) -> Settled:
        """Have the weights put right after the executor, unless an older one lives: a request is always with the oldest.

        What lives may change its weights as it likes; one that came after it has had no request.
        """
        if any(number < executor for number, _ in self._alive.values()):
            return Settled()
        return self._house.holder.settle(self._free)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
