"""Devices are chosen once, by the variable that the vendor's own driver knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.slurm.devices import driver_variables, vendor_here, visible_devices
from edif_hpc.slurm.order import Vendor

CUDA, ROCR, HIP = "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"
#: What Slurm sets where gres.conf has no flags: its numbers are those of the node, three times.
ALL = {CUDA: "2,3", ROCR: "2,3", "GPU_DEVICE_ORDINAL": "2,3", "ZE_AFFINITY_MASK": "2,3"}


@pytest.mark.parametrize(
    ("vendor", "environ", "chosen"),
    [
        ("nvidia", {CUDA: "1"}, {CUDA: "1"}),
        ("nvidia", ALL, {CUDA: "2,3"}),
        ("nvidia", {CUDA: ""}, {CUDA: ""}),  # none of them, and that is a choice
        ("nvidia", {ROCR: "1", HIP: "1"}, {}),
        ("amd", {ROCR: "1"}, {ROCR: "1"}),
        ("amd", {HIP: "1"}, {HIP: "1"}),
        ("amd", {CUDA: "1"}, {CUDA: "1"}),
        ("amd", {HIP: "0", CUDA: "1"}, {HIP: "0"}),
        ("amd", ALL, {ROCR: "2,3"}),
        # HIP's are numbers among those that ROCR's leaves: 2 and 3 of two devices are none at all.
        ("amd", {ROCR: "2,3", HIP: "2,3"}, {ROCR: "2,3"}),
        ("amd", {"PATH": "/bin"}, {}),
        ("none", ALL, {}),
    ],
)
def test_one_variable_chooses(
    vendor: Vendor, environ: dict[str, str], chosen: dict[str, str]
) -> None:
    assert visible_devices(environ, vendor) == chosen


def test_the_linker_is_told_of_the_drivers_libraries() -> None:
    environ = {
        "LD_LIBRARY_PATH": "/.singularity.d/libs",
        "LD_PRELOAD": "x",
        "HF_TOKEN": "y",
        **ALL,
    }
    assert driver_variables(environ, "amd") == {
        "LD_LIBRARY_PATH": "/.singularity.d/libs",
        ROCR: "2,3",
    }


@pytest.mark.parametrize(
    ("nodes", "vendor"),
    [
        (["null", "nvidia0", "nvidiactl", "nvidia-uvm"], "nvidia"),
        (["null", "kfd"], "amd"),
        (["null", "dri"], "none"),
    ],
)
def test_whose_driver_is_here(tmp_path: Path, nodes: list[str], vendor: Vendor) -> None:
    for each in nodes:
        (tmp_path / each).touch()
    assert vendor_here(tmp_path) == vendor
