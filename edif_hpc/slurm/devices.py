"""Which of a node's GPUs are ours: what a scheduler says about it, for the driver of each vendor.

Where the site lets it, Slurm opens only our devices to us; everywhere it names them in a variable. Which one is for the
site to set up, and where nothing is set up, Slurm sets those of all vendors. ROCm knows three of them: its runtime applies
ROCR's, and HIP applies its own, or else CUDA's, to the devices that are left, which have new numbers by then. Two variables so
choose twice, and end with other devices, or none. CUDA knows its own alone, so on a node of NVIDIA's ROCR's hides nothing.

So one variable is passed on: the first of the vendor's that is set. Two more are seen on clusters and not passed on:
GPU_DEVICE_ORDINAL is for OpenCL, NVIDIA_VISIBLE_DEVICES for what prepares a container of Docker's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edif_hpc.slurm.order import Vendor

_CHOICES: Final[Mapping[Vendor, tuple[str, ...]]] = {
    "nvidia": ("CUDA_VISIBLE_DEVICES",),
    "amd": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
    "none": (),
}
_NODES: Final[Mapping[Vendor, str]] = {"nvidia": "nvidiactl", "amd": "kfd"}


def visible_devices(environ: Mapping[str, str], vendor: Vendor) -> dict[str, str]:
    """The variable by which the scheduler chose devices for us; empty if it set none that the vendor's driver knows."""
    name = next((each for each in _CHOICES[vendor] if each in environ), None)
    return {} if name is None else {name: environ[name]}


def driver_variables(environ: Mapping[str, str], vendor: Vendor) -> dict[str, str]:
    """What a program needs to find the driver's libraries, which Apptainer tells the linker of, and our devices."""
    linker = {name: value for name, value in environ.items() if name == "LD_LIBRARY_PATH"}
    return linker | visible_devices(environ, vendor)


def vendor_here(dev: Path = Path("/dev")) -> Vendor:
    """Whose driver this machine, or this container, has."""
    return next((vendor for vendor, node in _NODES.items() if (dev / node).exists()), "none")
