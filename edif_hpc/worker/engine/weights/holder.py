"""The process that has the weights on the devices, when executors share them there.

It is executed fresh by the zygote before that shuts itself in, loads the weights once from the zygote's memory files into
arenas (`arena`), and hands out what opens them, a handle for each GPU; for a stand-in the arena is a file that the zygote has made. From then on it does one
thing: when an executor is gone, it waits until its memory is back (a kernel of it may have been running), looks which blocks
have changed, and restores them. It runs nobody's code, reads nothing that an executor has said, and has walls of its own:
no privileges, no sockets, no processes, and of files only the driver's and libraries to read. Handles of torch count their users
in /dev/shm, so it may write there.

It dies with the zygote, and the zygote with it.

    python -m edif_hpc.worker.engine.weights.holder CONTROL_FD ZYGOTE_PID
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgpack

from edif_hpc.errors import EdifError, EngineError
from edif_hpc.worker.engine.messages import TO_HOLDER, Held, Hold, Refused, Settle, Settled
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, Channel, PeerClosed
from edif_hpc.worker.engine.walls import jail

if TYPE_CHECKING:
    import torch

    from edif_hpc.worker.engine.model.device import Device
    from edif_hpc.worker.engine.weights.arena import Arena

LAST_FD: Final = 1 << 20
MOST_FILES: Final = 64


def main(arguments: list[str]) -> int:
    """Load, then settle on order until the zygote is gone."""
    control_fd, zygote_pid = int(arguments[0]), int(arguments[1])
    os.closerange(3, control_fd)
    os.closerange(control_fd + 1, LAST_FD)
    jail.follow(os.pidfd_open(zygote_pid))
    channel = Channel(
        socket.socket(fileno=control_fd),
        accepts=TO_HOLDER,
        send_limit=FROM_ZYGOTE_BYTES,
        max_fds=MOST_FILES,
    )
    try:
        _serve(channel)
    except PeerClosed:
        return 0
    except EdifError as error:
        channel.send(Refused(code=error.code, message=str(error)))
    except Exception as error:  # noqa: BLE001 - a process main: whatever stops it is reported
        said = f"{type(error).__name__}: {error}"[:4000]
        channel.send(Refused(code=EngineError.code, message=said))
    return 1


def _serve(channel: Channel) -> None:
    hold, fds = channel.receive()
    if not isinstance(hold, Hold):
        raise EngineError(f"a holder is sent {type(hold).__name__} before Hold")
    jail.confine([Path(each) for each in hold.readable], gpu=hold.device != "cpu:0")
    tempfile.tempdir = os.curdir  # imports ask for one; nothing is written
    from edif_hpc.worker.engine.model import device as devices  # noqa: PLC0415 - heavy, and behind walls

    own = devices.of(hold.device, hold.devices)
    name = devices.start(own)
    arenas, handles = _arenas(own, hold, fds)
    for each in own:
        each.settle()  # all of it is there before anybody opens it
    channel.send(Held(device_name=name, handles=handles))
    while True:
        settle, _ = channel.receive()
        if not isinstance(settle, Settle):
            raise EngineError(f"a holder is sent {type(settle).__name__} while serving")
        began = monotonic()
        for each, before in zip(own, settle.free_bytes, strict=False):
            devices.wait_for_memory(each, 0, before=before)
        restored = sum(arena.settle() for arena in arenas)
        channel.send(Settled(restored=restored, seconds=monotonic() - began))


def _arenas(
    own: Sequence[Device], hold: Hold, fds: Sequence[int]
) -> tuple[list[Arena], dict[str, bytes]]:
    """Fill an arena on each device; return them, and the handles of those on GPUs."""
    from edif_hpc.worker.engine.model import room  # noqa: PLC0415 - see above
    from edif_hpc.worker.engine.weights import arena  # noqa: PLC0415 - see above

    regions = arena.unpack(hold.regions)
    inherited = hold.files - hold.arenas
    files = [_mapped(fd, mmap.MAP_PRIVATE) for fd in fds[:inherited]]
    stand_ins = [_mapped(fd, mmap.MAP_SHARED) for fd in fds[inherited:]]
    made: list[Arena] = []
    handles: dict[str, bytes] = {}
    for number, device in enumerate(own):
        mine = [each for each in regions if each.device == number]
        free, total = device.memory()
        room.check_device(sum(each.size for each in mine), free=free, total=total)
        if device.gpu:
            size = arena.arena_bytes(mine, least=arena.GPU_LEAST_BYTES)
            memory, handles[str(number)] = _on_gpu(device.torch, size)
        else:
            memory = stand_ins[number]
        made.append(arena.Arena(memory, mine, files))
    return made, handles


def _on_gpu(device: torch.device, size: int) -> tuple[torch.Tensor, bytes]:
    """A piece of a GPU's memory that nothing else of this process lies in, and its handle."""
    import torch  # noqa: PLC0415 - see above

    torch.cuda.empty_cache()
    memory = torch.zeros(size, dtype=torch.uint8, device=device)
    segments = {each["address"]: each["total_size"] for each in torch.cuda.memory_snapshot()}  # type: ignore[no-untyped-call]
    if segments.get(memory.data_ptr()) != size:
        raise EngineError(
            "torch has put the weights into one piece of memory with something else, which a handle would open as well"
        )
    torch.cuda.synchronize(device)
    return memory, msgpack.packb(memory.untyped_storage()._share_cuda_())  # type: ignore[no-untyped-call]


def _mapped(fd: int, flags: int) -> torch.Tensor:
    """The bytes of a file."""
    import torch  # noqa: PLC0415 - see above

    # Writable, also where nobody writes: torch takes nothing else without a warning.
    memory = mmap.mmap(fd, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    return torch.frombuffer(memory, dtype=torch.uint8)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
