"""What is known when memory ran out. Torch's sentences about GPUs are given as it writes them."""

from __future__ import annotations

import errno

import pytest
import torch

from edif_hpc.domain.limits import Limits
from edif_hpc.worker.engine.request.scarce import Scarcity, lacks_disk, of_gpu, of_host, shortfall

GIB = 1 << 30
PLAIN = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.15 GiB of which 12.50 GiB is free. "
    "Including non-PyTorch memory, this process has 66.62 GiB memory in use. Of the allocated memory 65.00 GiB is allocated "
    "by PyTorch, and 1.00 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try "
    "setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
ALLOWED = (
    "HIP out of memory. Tried to allocate 512.00 MiB. GPU 3 has a total capacity of 191.98 GiB of which 180.00 GiB is free. "
    "10.00 GiB allowed; Of the allocated memory 9.00 GiB is allocated by PyTorch, and 768.00 MiB is reserved by PyTorch but "
    "unallocated."
)
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"


@pytest.mark.parametrize(
    ("said", "lacking"),
    [
        (PLAIN, {"0": int(7.5 * GIB)}),
        (ALLOWED, {"3": 256 << 20}),
        (PLAIN.replace("12.50 GiB", "25.00 GiB"), {"0": 0}),
        (CPU, {}),
        ("CUDA error: out of memory", {}),
        ("", {}),
    ],
)
def test_what_a_gpu_lacked(said: str, lacking: dict[str, int]) -> None:
    assert shortfall(said) == lacking


def test_it_names_the_largest_of_what_was_saved() -> None:
    large, small, other = torch.zeros(8, 512), torch.zeros(2), torch.ones(3, dtype=torch.bool)
    kept = [other, torch.zeros(100, 100)]
    unsaved = torch.zeros(1000, 1000)
    saved = {id(each) for each in (large, small, kept)}
    scarcity = Scarcity()
    try:
        raise MemoryError
    except MemoryError as error:
        scarcity.note(error, saved)
        meta = scarcity.meta(error)
    assert meta == {
        "largest_saved": [
            {"name": "kept", "shape": [100, 100], "dtype": "float32", "device": "cpu", "bytes": 40_000},
            {"name": "large", "shape": [8, 512], "dtype": "float32", "device": "cpu", "bytes": 16_384},
            {"name": "small", "shape": [2], "dtype": "float32", "device": "cpu", "bytes": 8},
        ]
    }  # fmt: skip
    assert "kept float32 [100, 100], 39.06 KiB; large" in scarcity.text()
    assert unsaved.nbytes > 40_000


def test_nothing_saved_is_nothing_to_tell() -> None:
    scarcity = Scarcity()
    scarcity.note(MemoryError(), set())
    assert scarcity.text() == ""
    assert scarcity.meta(MemoryError()) == {"largest_saved": []}


def test_the_hosts_memory() -> None:
    over = of_host(Limits(memory_bytes=GIB), RuntimeError(CPU), 3 * GIB)
    assert "asked for 2 GiB at once" in str(over)
    assert "peak of 3 GiB with the model" in str(over)
    assert over.details["limit"] == "memory_bytes"


def test_a_gpus_memory_has_a_limit_or_an_end() -> None:
    limits = Limits(gpu_memory_bytes=10 * GIB, sources={"gpu_memory_bytes": "the token ada"})
    over = of_gpu(limits, torch.OutOfMemoryError(ALLOWED), 192 * GIB)
    assert "GPU memory is 10 GiB, set by the token ada" in str(over)
    over = of_gpu(Limits(), torch.OutOfMemoryError(PLAIN), 80 * GIB)
    assert "GPU memory is 80 GiB, set by the GPU itself" in str(over)
    assert over.details["value"] == 80 * GIB


@pytest.mark.parametrize(
    ("error", "own", "lacks"),
    [
        (OSError(errno.EFBIG, "File too large"), True, True),
        (OSError(errno.EFBIG, "File too large"), False, True),
        (OSError(errno.ENOSPC, "No space left on device"), True, True),
        (OSError(errno.ENOSPC, "No space left on device"), False, False),
        (RuntimeError("PytorchStreamWriter failed: File too large"), False, True),
        (OSError(errno.EACCES, "Permission denied"), True, False),
    ],
)
def test_files_that_are_too_many_or_too_large(error: Exception, own: bool, lacks: bool) -> None:
    assert lacks_disk(error, own=own) is lacks
