"""The device that an executor computes on, when that is not the CPU.

A driver does not survive a fork: a process that has once asked it anything forks children in which it is broken. So the
zygote does not even see a device (`environment` hides them), and all that is here happens in an executor, after its walls:
it is shown the devices that the scheduler chose, starts the driver, and waits until there is room. An executor that was
killed can leave its memory behind for a while, in particular when a kernel of it still ran, and a request that began
before it is back would run out of memory through no fault of its own. How much has to be free is what the first
executor found.

PyTorch for ROCm calls its devices `cuda` as well, so one class does for both vendors. `cpu:0` stands in for a device where
there is none: each executor has a copy of the weights in its own memory. It is for tests.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch

from edif_hpc.domain.deployment import check_device
from edif_hpc.errors import EngineError, SettingsError
from edif_hpc.worker.engine import environment
from edif_hpc.worker.engine.model import room
from edif_hpc.worker.engine.walls import jail

#: How long the memory of executors before may take to come back.
MEMORY_BACK_S: Final = 30.0
#: What a driver may keep of it for itself, as far as we care: so much, and this part of all.
_KEPT_BYTES: Final = 256 << 20
_KEPT_PART: Final = 0.01
_LOOK_S: Final = 0.05
_GB: Final = 1e9


class Device(Protocol):
    """One that executors have copies of the weights on."""

    torch: torch.device
    #: Whether a driver is needed, and what leads to it.
    gpu: bool

    def start(self) -> str:
        """Be able to use it; return its name. Once, in an executor."""
        ...

    def memory(self) -> tuple[int, int]:
        """Return how many bytes are free, and how many there are."""
        ...

    def settle(self) -> None:
        """Wait for all that it was told to do.

        Raises:
            EngineError: something of it failed.
        """
        ...

    def begin(self, more_bytes: int | None = None) -> None:
        """Count the peak from here, and let this process take so much more of its memory, if that is given."""
        ...

    def peak_bytes(self) -> int:
        """Return the most that this process had of its memory since `begin`."""
        ...

    def lacks(self, error: BaseException) -> bool:
        """Whether the error says that its memory, not the host's, ran out."""
        ...


class Gpu:
    """One of the devices that we were given, the first as a rule."""

    gpu = True

    def __init__(self, index: int = 0) -> None:
        self.torch = torch.device("cuda", index)

    def start(self) -> str:
        """Start the driver."""
        try:
            torch.cuda.init()  # type: ignore[no-untyped-call]
            if self.torch.index == 0:
                torch.cuda.set_device(self.torch)
            return torch.cuda.get_device_name(self.torch)
        except (RuntimeError, AssertionError) as error:
            nodes = ", ".join(map(str, jail.driver_nodes())) or "none"
            raise EngineError(
                f"the GPU cannot be used: {error}; nodes of a driver here: {nodes}; scripts/check-gpu says more"
            ) from error

    def memory(self) -> tuple[int, int]:
        """Ask the driver, which counts all processes."""
        return torch.cuda.mem_get_info(self.torch)

    def settle(self) -> None:
        """Errors of kernels are told late; this is where."""
        try:
            torch.cuda.synchronize(self.torch)
        except RuntimeError as error:
            raise EngineError(f"the GPU failed: {error}") from error

    def begin(self, more_bytes: int | None = None) -> None:
        """Count the peak from here. Torch keeps to a limit, but code can tell torch otherwise."""
        if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            return
        torch.cuda.reset_peak_memory_stats(self.torch)
        if more_bytes is not None:
            torch.cuda.empty_cache()  # what is kept for later counts as taken
            most = torch.cuda.memory_reserved(self.torch) + more_bytes
            total = torch.cuda.get_device_properties(self.torch).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, most / total), self.torch)

    def peak_bytes(self) -> int:
        """Return the most that was taken since `begin`; 0 in the zygote, which rehearses without a device."""
        initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated(self.torch) if initialized else 0

    def lacks(self, error: BaseException) -> bool:
        """Torch has a class of its own for it; what the driver cannot allocate, it says itself."""
        said = str(error)
        return isinstance(error, torch.OutOfMemoryError) or "CUDA" in said or "HIP" in said


class StandIn:
    """The CPU, used as a device is."""

    gpu = False

    def __init__(self) -> None:
        self.torch = torch.device("cpu")

    def start(self) -> str:
        """There is nothing to start."""
        return "stand-in"

    def memory(self) -> tuple[int, int]:
        """All that is free counts as all."""
        free = room.free_bytes() or 0
        return free, free

    def settle(self) -> None:
        """The CPU does at once what it is told."""

    def begin(self, more_bytes: int | None = None) -> None:
        """Nothing counts it."""

    def peak_bytes(self) -> int:
        """Nothing counts it."""
        return 0

    def lacks(self, error: BaseException) -> bool:  # noqa: ARG002 - its memory is the host's
        """Its memory is the host's."""
        return True


def of(name: str, count: int = 1) -> tuple[Device, ...]:
    """Return the devices of a name; none for the CPU, where executors share what the zygote holds.

    Raises:
        InvalidInput: there is no such device.
        SettingsError: this torch has no support for it.
    """
    if check_device(name) == "cpu":
        return ()
    if name == "cpu:0":
        return tuple(StandIn() for _ in range(count))
    if not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise SettingsError(
            f"torch {torch.__version__} here is built for neither CUDA nor ROCm; let the worker run in the image for its GPU "
            "(docs/howto/images.md), or deploy the model on the device cpu"
        )
    return tuple(map(Gpu, range(count)))


def start(devices: Sequence[Device]) -> str:
    """Start them; return their names, each once."""
    names = [each.start() for each in devices]
    kinds = ", ".join(dict.fromkeys(names))
    return kinds if len(names) == 1 else f"{len(names)} x {kinds}"


def show(driver: Mapping[str, str]) -> None:
    """Let this process see the devices that were hidden from the zygote; `driver` chooses them."""
    for name in environment.HIDDEN:
        os.environ.pop(name, None)  # noqa: TID251 - written, for drivers
    os.environ.update(driver)  # noqa: TID251 - see above
    from transformers.utils import import_utils  # noqa: PLC0415 - the holder has no use for all of it

    # What transformers has asked in the zygote it would answer from memory.
    for name, asked in vars(import_utils).items():
        if name.startswith("is_torch_") and hasattr(asked, "cache_clear"):
            asked.cache_clear()


def wait_for_memory(
    device: Device, needed: int, *, before: int, timeout_s: float = MEMORY_BACK_S
) -> int:
    """Wait until `needed` bytes are free, and as much as the first executor found; return how many are.

    `before` is what it found, 0 for itself.

    Raises:
        EngineError: the weights do not fit, or what was taken does not come back.
    """
    free, total = device.memory()
    kept = _KEPT_BYTES + int(total * _KEPT_PART)
    if not device.gpu:
        before = 0  # the host's is everybody's
    wanted, until = max(needed, before - kept), time.monotonic() + timeout_s
    while free < wanted and needed <= total:
        if time.monotonic() > until:
            break
        time.sleep(_LOOK_S)  # no driver tells when memory is back
        free, _ = device.memory()
    room.check_device(needed, free=free, total=total)
    if free < wanted:
        raise EngineError(
            f"{free / _GB:.1f} GB of the GPU's {total / _GB:.1f} GB are free, {before / _GB:.1f} GB were before requests ran, and "
            f"they are not back after {timeout_s:g} s: another process uses the GPU, or the driver holds what a killed executor had"
        )
    return free


def scarcity(device: Device) -> str:
    """Tell a researcher whose request ran out of the device's memory what there is and who has it."""
    free, total = device.memory()
    held = max(_held(device), key=lambda each: each.nbytes, default=None)
    largest = f"; its largest tensor there: {_described(held)}" if held is not None else ""
    return (
        f"The memory of the GPU ran out. The request with the model had at most {device.peak_bytes() / _GB:.2f} GB of "
        f"{total / _GB:.2f} GB, {free / _GB:.2f} GB are free{largest}."
    )


def _held(device: Device) -> list[torch.Tensor]:
    """The tensors that came after the zygote's, whose own are frozen out of the collector's sight."""
    found: list[Any] = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return [each for each in found if each.device == device.torch]


def _described(tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{dtype} {list(tensor.shape)}, {tensor.nbytes / _GB:.2f} GB"
