"""Weights that executors share on a device: one copy, which whoever runs can write, and which is put right after him.

A GPU cannot give one process what another may only read, so every executor that opens the weights could change them for all.
What keeps them right is order. One executor at a time has a request (the pool sees to that). The next one may be ready
beside it, that is, have started the driver, opened the weights and rehearsed, whose outcome nobody keeps; nothing that
it computed from weights stays. When the first is gone, the holder (`holder`) restores what it has changed, and only then is
the next one given a request. The time is told in the `meta` of the request that it is owed to.

That this works here is tried at the start, by an executor that is thrown away: it puts up its walls, opens the weights, and compares
them. A GPU in the compute mode EXCLUSIVE_PROCESS, a part of one (MIG), or a driver that wants both processes in one PID
namespace refuse it; then each executor has a copy of its own (`weights.Private`), and `ps` says why. Without walls that hold
what an executor has started, something of it could write later, so sharing needs the level `no-namespaces`.
"""

from __future__ import annotations

import mmap
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgpack
import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine import environment
from edif_hpc.worker.engine.messages import (
    FROM_HOLDER,
    Held,
    Hold,
    Message,
    Refused,
    Settle,
    Settled,
)
from edif_hpc.worker.engine.model import device as devices
from edif_hpc.worker.engine.protocol import FROM_WORKER_BYTES, Channel, PeerClosed
from edif_hpc.worker.engine.walls.jail import Jail, in_child
from edif_hpc.worker.engine.weights.arena import Region, arena_bytes, pack
from edif_hpc.worker.engine.weights.base import (
    ALIGNMENT,
    CACHE_LINE,
    MemoryFile,
    Spread,
    as_bytes,
    grouped,
    move_others,
    storage_in,
)

#: What opens one storage of an arena: from where, and how many bytes.
_Open = Callable[[int, int], torch.UntypedStorage]
_PROBE: Final = "probe"


class Shared(MemoryFile):
    """The holder for devices on which executors have the same weights; it speaks to the process that holds them."""

    way = "shared"
    copies = False

    def __init__(self) -> None:
        super().__init__()
        #: Of each sealed file: its descriptor, and where this process has it.
        self._files: list[tuple[int, int, int]] = []
        self._regions: dict[tuple[int, int], Region] = {}
        self._openers: list[_Open] = []
        self._driver: Mapping[str, str] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel

    def sealed(self, fd: int, memory: memoryview) -> None:
        """Keep the file for the process that is started later."""
        self._files.append((os.dup(fd), storage_in(memory).data_ptr(), len(memory)))

    # -- in the zygote -------------------------------------------------------

    def start(
        self,
        spreads: Sequence[Spread],
        kind: str,
        count: int,
        *,
        driver: Mapping[str, str],
        readable: Sequence[Path],
    ) -> None:
        """Start the process that holds them, on `count` devices of a kind; it loads them before this returns.

        Raises:
            EngineError: it cannot.
        """
        self._regions = _laid_out(spreads, [(start, size) for _, start, size in self._files])
        arenas = [] if kind == "cuda" else [self._in_file(number) for number in range(count)]
        fds = [*(fd for fd, _, _ in self._files), *arenas]
        hold = Hold(
            device=kind,
            devices=count,
            files=len(fds),
            arenas=len(arenas),
            regions=pack(self._regions.values()),
            readable=[str(each) for each in readable],
        )
        self._driver = driver
        self._process, self._channel = _started(driver)
        try:
            held = self._ask(hold, fds)
        finally:
            for fd in fds:
                os.close(fd)
        if not isinstance(held, Held):
            raise EngineError(f"a holder answers Hold with {type(held).__name__}")
        by_number = sorted(held.handles.items(), key=lambda each: int(each[0]))
        self._openers += [_from_handle(packed) for _, packed in by_number]

    def probe(
        self, jail: Jail, folder: Path, spreads: Sequence[Spread], own: Sequence[devices.Device]
    ) -> None:
        """Open the weights as an executor does, behind its walls, and compare them with the files.

        Raises:
            EngineError: that fails; the message says what the executor saw.
        """
        place = folder / _PROBE
        place.mkdir(mode=0o700)
        with in_child(jail.fork) as complaint:
            if complaint is None:
                jail.enter(place)
                self._try(spreads, own)
        shutil.rmtree(place, ignore_errors=True)
        if complaint:
            raise EngineError(f"an executor cannot open the weights: {complaint}")

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._channel.close()
            self._process.kill()
            self._process.wait()

    def fileno(self) -> int:
        """Return a descriptor that has something to read when the process has ended by itself."""
        return self._channel.fileno()

    def ended(self) -> EngineError:
        """Return why it has."""
        try:
            message, _ = self._channel.receive()
        except PeerClosed:
            return self._lost()
        said = message.message if isinstance(message, Refused) else type(message).__name__
        return EngineError(f"the process that held the weights says: {said}")

    def settle(self, free_bytes: Sequence[int]) -> Settled:
        """Have it wait until memory is back, and restore what was changed.

        Raises:
            EngineError: it cannot, or is gone.
        """
        said = self._ask(Settle(free_bytes=list(free_bytes)))
        if not isinstance(said, Settled):
            raise EngineError(f"a holder answers Settle with {type(said).__name__}")
        return said

    def _ask(self, message: Message, fds: Sequence[int] = ()) -> Message:
        try:
            self._channel.send(message, fds)
            said, _ = self._channel.receive()
        except (PeerClosed, BrokenPipeError, ConnectionResetError) as error:
            raise self._lost() from error
        if isinstance(said, Refused):
            raise EngineError(said.message)
        return said

    def _in_file(self, number: int) -> int:
        """Make the arena of a stand-in, and have it mapped, so that executors inherit it; return its file."""
        size = arena_bytes([each for each in self._regions.values() if each.device == number])
        fd = os.memfd_create("arena", os.MFD_CLOEXEC)
        os.ftruncate(fd, size)
        memory = memoryview(mmap.mmap(fd, size))
        self._openers.append(lambda start, size: storage_in(memory[start : start + size]))
        return fd

    def _lost(self) -> EngineError:
        status = self._process.wait() if self._process is not None else None
        return EngineError(f"the process that held the weights ended (status {status})")

    # -- in an executor ------------------------------------------------------

    def open(self, spreads: Sequence[Spread], devices: Sequence[torch.device]) -> None:
        """Let the tensors be the same views on the arenas.

        Raises:
            EngineError: a handle cannot be opened, or a tensor not be moved.
        """
        opened: dict[tuple[int, int], torch.UntypedStorage] = {}
        for spread in spreads:
            for group in grouped(spread.module):
                key = group.storage.data_ptr(), group.storage.nbytes()
                region = self._regions[key]
                if key not in opened:
                    opened[key] = self._openers[region.device](region.place, region.size)
                group.point(opened[key])
            move_others(spread, devices)

    def _try(self, spreads: Sequence[Spread], own: Sequence[devices.Device]) -> None:
        begins = [
            as_bytes(group.storage)[:CACHE_LINE].clone()
            for spread in spreads
            for group in grouped(spread.module)
        ]
        groups = [group for spread in spreads for group in grouped(spread.module)]
        devices.show(self._driver)
        devices.start(own)
        self.open(spreads, [each.torch for each in own])
        for begin, group in zip(begins, groups, strict=True):
            if not torch.equal(as_bytes(group.storage)[:CACHE_LINE].cpu(), begin):
                raise EngineError(f"what {group.name} has there is not what was loaded")


def _laid_out(
    spreads: Sequence[Spread], files: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Region]:
    """Give each storage, by its address and size, a place on its device, where a cache line begins as it does in its file."""
    regions: dict[tuple[int, int], Region] = {}
    ends: dict[int, int] = {}
    for spread in spreads:
        for group in grouped(spread.module):
            address, size = group.storage.data_ptr(), group.storage.nbytes()
            if (address, size) in regions:
                continue
            file, start = _found(address, files)
            device = spread.index_of(group.name)
            place = ends.get(device, 0) + start % ALIGNMENT
            regions[address, size] = Region(
                device=device, place=place, size=size, file=file, start=start
            )
            ends[device] = -(-(place + size) // ALIGNMENT) * ALIGNMENT
    return regions


def _found(address: int, files: Sequence[tuple[int, int]]) -> tuple[int, int]:
    for number, (start, size) in enumerate(files):
        if start <= address < start + size:
            return number, address - start
    raise EngineError("a tensor of the model is of a kind that cannot be shared")


def _started(driver: Mapping[str, str]) -> tuple[subprocess.Popen[bytes], Channel]:
    """Execute the program, which sees the devices that this one does not."""
    kept = {k: v for k, v in os.environ.items() if k not in environment.HIDDEN}  # noqa: TID251 - made for the zygote
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-P", "-m", f"{__package__}.holder", str(theirs.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**kept, **driver},
            pass_fds=[theirs.fileno()],
        )  # fmt: skip
    channel = Channel(ours, accepts=FROM_HOLDER, send_limit=FROM_WORKER_BYTES)
    return process, channel


def _from_handle(packed: bytes) -> _Open:
    """Open storages of a GPU's arena; in an executor, once the driver is started."""
    device, handle, _, offset, counter, place, event, _ = msgpack.unpackb(packed)

    def opened(start: int, size: int) -> torch.UntypedStorage:
        try:
            # As torch.multiprocessing does, but without waiting for an event: all was written before the handle was made.
            return torch.UntypedStorage._new_shared_cuda(  # noqa: SLF001
                device,
                handle,
                size,
                offset + start,
                counter,
                place,
                event,
                False,  # noqa: FBT003
            )
        except RuntimeError as error:
            raise EngineError(
                f"the driver does not open another process's memory: {error}"
            ) from error

    return opened
