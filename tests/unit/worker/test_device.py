"""What an executor asks of a device, played by one whose memory the test decides."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch

from edif_hpc.errors import EngineError, InvalidInput, SettingsError
from edif_hpc.worker.engine.model import device as devices
from edif_hpc.worker.engine.model import room

GB = 10**9


@dataclass(kw_only=True)
class Played(devices.StandIn):
    """A device of 80 GB; its free memory is what the test says, the last one for ever."""

    free: list[int]
    torch: torch.device = field(default_factory=lambda: torch.device("cpu"))
    total: int = 80 * GB
    gpu = True

    def memory(self) -> tuple[int, int]:
        return (self.free.pop(0) if len(self.free) > 1 else self.free[0]), self.total

    def peak_bytes(self) -> int:
        return 79 * GB


def test_the_cpu_is_no_device() -> None:
    assert devices.of("cpu") == ()
    [one] = devices.of("cpu:0")
    assert isinstance(one, devices.StandIn)
    assert devices.start(devices.of("cpu:0", 2)) == "2 x stand-in"


@pytest.mark.parametrize("name", ["cuda:0,1", "cuda:1", "rocm", "mps", "auto", ""])
def test_other_devices_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidInput, match="choose cpu, or cuda for GPUs of NVIDIA or AMD"):
        devices.of(name)


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has CUDA")
def test_a_torch_without_a_driver_says_which_image_to_take() -> None:
    with pytest.raises(SettingsError, match="built for neither CUDA nor ROCm"):
        devices.of("cuda")


def test_a_gpu_that_cannot_be_started_says_what_there_is() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"the GPU cannot be used: .*; nodes of a driver here: "):
        devices.Gpu().start()


def test_a_process_that_has_not_begun_with_a_gpu_is_not_asked_for_its_peak() -> None:
    gpu = devices.Gpu()
    gpu.begin()
    assert gpu.peak_bytes() == 0
    assert gpu.lacks(torch.OutOfMemoryError())
    assert gpu.lacks(RuntimeError("CUDA error: out of memory"))
    assert not gpu.lacks(MemoryError())


def test_memory_that_comes_back_is_waited_for() -> None:
    device = Played(free=[10 * GB, 10 * GB, 60 * GB, 78 * GB])
    assert devices.wait_for_memory(device, 4 * GB, before=78 * GB) == 78 * GB


def test_what_a_driver_keeps_is_not_waited_for() -> None:
    device = Played(free=[77 * GB])
    assert devices.wait_for_memory(device, 4 * GB, before=78 * GB) == device.free[0]


def test_the_first_executor_waits_for_no_more_than_the_weights() -> None:
    device = Played(free=[2 * GB, 5 * GB])
    assert devices.wait_for_memory(device, 4 * GB, before=0) == 5 * GB


def test_memory_that_does_not_come_back_is_told() -> None:
    with pytest.raises(
        EngineError,
        match=r"10\.0 GB of the GPU's 80\.0 GB are free, 78\.0 GB were before requests",
    ):
        devices.wait_for_memory(Played(free=[10 * GB]), 4 * GB, before=78 * GB, timeout_s=0.0)


@pytest.mark.parametrize(("needed", "timeout_s"), [(100, 3600.0), (60, 0.0)])
def test_weights_that_do_not_fit_are_told(needed: int, timeout_s: float) -> None:
    """At once if they never will."""
    device = Played(free=[50 * GB])
    words = (
        rf"weights take {needed}\.0 GB, and 50\.0 GB of its 80\.0 GB are free; .*--gpu.*--dtype"
    )
    with pytest.raises(EngineError, match=words):
        devices.wait_for_memory(device, needed * GB, before=0, timeout_s=timeout_s)


def test_who_runs_out_of_memory_is_told_what_took_it() -> None:
    held = torch.zeros(1000, 70_000, dtype=torch.uint8)
    said = devices.scarcity(Played(free=[GB]))
    assert "at most 79.00 GB of 80.00 GB, 1.00 GB are free" in said
    assert f"its largest tensor there: uint8 {list(held.shape)}, 0.07 GB" in said


def test_the_stand_in_has_the_memory_of_the_host() -> None:
    stand_in = devices.StandIn()
    assert stand_in.start() == "stand-in"
    assert stand_in.memory()[0] <= (room.free_bytes() or 0) * 2
    stand_in.begin()
    assert (stand_in.peak_bytes(), stand_in.lacks(MemoryError())) == (0, True)


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("ROCR_VISIBLE_DEVICES", raising=False)
    yield
    os.environ.pop("ROCR_VISIBLE_DEVICES", None)


@pytest.mark.usefixtures("hidden")
def test_a_process_is_shown_the_devices_that_were_chosen() -> None:
    devices.show({"ROCR_VISIBLE_DEVICES": "2"})
    assert os.environ["ROCR_VISIBLE_DEVICES"] == "2"
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_transformers_asks_again_once_devices_are_shown() -> None:
    program = """
import torch
from transformers.utils import is_torch_cuda_available
from edif_hpc.worker.engine.model import device
before = is_torch_cuda_available()
torch.cuda.is_available = lambda: True  # what a driver would say
kept = is_torch_cuda_available()
device.show({})
print(before, kept, is_torch_cuda_available())
"""
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environ)
    assert done.stdout.split() == ["False", "False", "True"]
