"""What the environments of the engine's programs say. They are written out here, whole; the worker's is not inherited.

When the engine is to use a GPU, a few variables of the worker's come along (`EngineSpec.driver`). The linker's, by which the
driver's libraries are found, counts when a program starts. Those that choose devices go to executors alone: from the zygote
every device is hidden, so that no library in it starts a driver, which does not survive a fork, or puts a model on a device
by itself, as pipelines of transformers do.

What libraries keep for the next run is above all code that they compiled, for the CPU or the GPU: whoever can write there
runs code in the next process that reads it. So no two executors share such a place. Each has its own, in the folder that goes
when it goes; what it needs, it compiles anew. What the zygote keeps lies in its home, where executors may read and not
write, and no request reaches the zygote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from edif_hpc.worker.engine.values import EngineSpec, Level

#: What hides all devices, of either vendor, while it is empty; torch then does not even ask a driver.
HIDDEN: Final[Mapping[str, str]] = {"CUDA_VISIBLE_DEVICES": ""}
_LINKER: Final = "LD_LIBRARY_PATH"
#: What has libraries of a hub say at once that there is no network, instead of trying again for half a minute.
OFFLINE: Final[Mapping[str, str]] = {"HF_HUB_OFFLINE": "1"}
#: What has joblib run its jobs one after the other where child processes are not allowed.
_SERIAL: Final[Mapping[str, str]] = {"JOBLIB_MULTIPROCESSING": "0"}
#: Named one by one, although most would follow HOME: a library may have looked already when an executor is forked.
#: Each is right below the folder, since not all of them make more than one folder.
_CACHES: Final[Mapping[str, str]] = {
    "XDG_CACHE_HOME": ".cache",
    "TRITON_CACHE_DIR": ".triton",
    "TORCHINDUCTOR_CACHE_DIR": ".inductor",
    "CUDA_CACHE_PATH": ".cuda",
    "MIOPEN_USER_DB_PATH": ".miopen",
    "MIOPEN_CUSTOM_CACHE_DIR": ".miopen",
}


def of_program(spec: EngineSpec) -> dict[str, str]:
    """Return the whole environment of the zygote, and of what fetches for it."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        **places(home(spec.scratch)),
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # One thread before the fork, in every library that would make a pool.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        # Threads that wait for work must not spin: executors share the cores with each other.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        # Asked whether there is a GPU, torch must not start the driver: it does not survive a fork.
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        **HIDDEN,
        **{name: value for name, value in spec.driver.items() if name == _LINKER},
    }


def of_driver(spec: EngineSpec) -> dict[str, str]:
    """Return what an executor's driver is told beyond that: which devices are ours."""
    return {name: value for name, value in spec.driver.items() if name != _LINKER}


def home(scratch: Path) -> Path:
    """Return the zygote's home."""
    return scratch / "home"


def of_executor(folder: Path, level: Level) -> dict[str, str]:
    """Return what an executor's environment says beyond the zygote's."""
    return {**places(folder), **({} if level is Level.FULL else _SERIAL)}


def places(folder: Path) -> dict[str, str]:
    """Return what leads all that a process leaves behind, caches above all, below `folder`."""
    caches = {name: str(folder / below) for name, below in _CACHES.items()}
    return {"HOME": str(folder), "TMPDIR": str(folder), **caches}
