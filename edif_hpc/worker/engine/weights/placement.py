"""Which part of a model is on which of several devices.

A model that is larger than one GPU is cut between its layers, as transformers cuts it for `device_map="auto"`: accelerate says
which module goes where, so that blocks with a residual connection stay whole and tied weights stay together, and its hooks
move what passes from one device to the next. nnsight knows these hooks, so every module can be read and written as on one device;
a tensor that a block reads is where its module is.

The map depends on the sizes of the devices alone, not on what is free, so that every executor, and the holder of shared
weights, has the same one. The zygote makes it, which sees no device: a process that it forks for that asks the driver.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.model import device as devices
from edif_hpc.worker.engine.weights.base import Spread

_GB: Final = 1e9
#: Left of each device for what requests compute.
_FOR_WEIGHTS: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class Placement:
    """The number of the device of each part of a model, by the name of its module; that of the whole is empty."""

    parts: Mapping[str, int]

    def index_of(self, name: str) -> int:
        """Return the number of the device that a tensor or module of this name is on."""
        while name not in self.parts and name:
            name = name.rpartition(".")[0]
        return self.parts.get(name, 0)

    def spread(self, module: torch.nn.Module) -> Spread:
        """The module with the device of each of its tensors."""
        return Spread(module=module, index_of=self.index_of)

    def connect(self, module: torch.nn.Module, own: Sequence[torch.device]) -> None:
        """Have what passes between parts moved to their devices; the weights are there already."""
        if len(own) == 1:
            return
        from accelerate import dispatch_model  # noqa: PLC0415 - heavy, and only for several

        # The first is where inputs go; a hook is wanted also where devices are equal, as stand-ins are.
        dispatch_model(
            module,
            {name: own[index] for name, index in self.parts.items()},
            main_device=own[0],
            skip_keys=getattr(module, "_skip_keys_device_placement", None),
            force_hooks=True,
        )


WHOLE: Final = Placement(parts={"": 0})


def place(module: torch.nn.Module, totals: Sequence[int]) -> Placement:
    """Cut a model for devices of these sizes.

    Raises:
        EngineError: it does not fit.
    """
    if len(totals) == 1:
        return WHOLE
    from accelerate import infer_auto_device_map  # noqa: PLC0415 - see above
    from accelerate.utils import get_balanced_memory  # noqa: PLC0415

    # It warns of devices that this process does not see, which is on purpose.
    logging.getLogger("accelerate.utils.modeling").setLevel(logging.ERROR)
    whole = [*(getattr(module, "_no_split_modules", None) or [])]
    room = {index: int(total * _FOR_WEIGHTS) for index, total in enumerate(totals)}
    room = get_balanced_memory(module, max_memory=room, no_split_module_classes=whole)
    found: Mapping[str, Any] = infer_auto_device_map(
        module, max_memory=room, no_split_module_classes=whole
    )
    left = [
        name for name, where in found.items() if not isinstance(where, int) or where not in room
    ]
    if left:
        sizes = ", ".join(f"{total / _GB:.1f}" for total in totals)
        raise EngineError(
            f"the model does not fit on its {len(totals)} GPUs of {sizes} GB: {len(left)} of its parts are left over, the first "
            f"is {left[0]!r}; give it more GPUs (--gpus), a kind with more memory (--gpu), or a smaller --dtype"
        )
    return Placement(parts=found)


def totals(
    own: Sequence[devices.Device],
    driver: Mapping[str, str],
    forked: Callable[[Callable[[], bytes]], bytes],
) -> list[int]:
    """Return the size of each device, asked for in a process that `forked` runs and throws away.

    Raises:
        EngineError: there are fewer.
    """

    def ask() -> bytes:
        devices.show(driver)
        devices.start(own)
        return json.dumps([each.memory()[1] for each in own]).encode()

    sizes: list[int] = json.loads(forked(ask))
    return sizes


def run_forked(work: Callable[[], bytes]) -> bytes:
    """Run `work` in a fork, and return what it returns.

    Raises:
        EngineError: it raised; the message is the error's.
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            said, status = work(), 0
        except BaseException as error:  # noqa: BLE001 - it is told to the parent, whatever it is
            said, status = str(error).encode()[:1000], 1
        os.write(write, said)
        os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    if os.waitpid(pid, 0)[1]:
        raise EngineError(said.decode(errors="replace"))
    return said
