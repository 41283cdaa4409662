"""Whether an image has what a worker needs: run by `%post`, by `%test`, and by `apptainer test IMAGE` on a node.

It imports what the engine imports, computes one small product, and says which devices it sees. None is no fault: the host
that builds an image need not have one.
"""

from __future__ import annotations

import importlib
import sys

import msgpack
import nnsight
import torch
import transformers
import zmq
import zstandard

#: What researchers' blocks import, by requirements.in.
THEIRS = ("accelerate", "datasets", "einops", "numpy", "pandas", "peft", "sklearn")
OURS = (
    "edif_hpc.worker.app",
    "edif_hpc.worker.engine.executor",
    "edif_hpc.worker.engine.model.fetch",
)


def main(flavour: str) -> int:
    """Check; the exit code is 0 if all is there."""
    for name in OURS + THEIRS:
        importlib.import_module(name)
    builds = {"cuda": torch.version.cuda, "rocm": torch.version.hip}
    if flavour in builds and not builds[flavour]:
        sys.stderr.write(f"torch {torch.__version__} is not built for {flavour}\n")
        return 1
    if torch.ones(3, 3).mm(torch.ones(3, 3)).sum().item() != 27:
        sys.stderr.write("torch cannot multiply\n")
        return 1
    modules = (torch, nnsight, transformers, zmq, msgpack, zstandard)
    versions = (f"{each.__name__} {getattr(each, '__version__', '?')}" for each in modules)
    devices = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    sys.stdout.write(f"{', '.join(versions)}; devices: {', '.join(devices) or 'none'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
