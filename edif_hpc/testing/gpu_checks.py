"""What `check_gpu` asks of a worker on a GPU, question by question: each says whether it held, and what was seen."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from edif_hpc.testing import gpu_cells as cells
from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.gpu_report import Finding
from edif_hpc.testing.stack import Stack

#: Wall time of a request; a killed one may take so long to be noticed.
WALL_S: Final = 15.0
ROUNDS: Final = 20
WARM_S: Final = 300.0
SEEN_CHARS: Final = 800
#: What of a GPU's memory may be another process's or the driver's from one moment to the next.
_SLACK_BYTES: Final = 256 << 20
_GPU_LIMIT_BYTES: Final = 64 << 20


@dataclass(kw_only=True)
class Trial:
    """A worker on one device or several, a client beside it, and what is found."""

    deployment: str
    device: str
    weights: str
    folder: Path
    stack: Stack
    client: ClientProcess
    #: How long a trace takes without us.
    local: Sequence[float]
    findings: list[Finding] = field(default_factory=list)

    def ask(self, what: str, check: Check) -> None:
        """Have a line; whatever goes wrong is one, too."""
        try:
            held, seen = check(self)
        except Exception as error:  # noqa: BLE001 - a check that breaks has not held, and the next can
            held, seen = False, f"{type(error).__name__}: {error}"
        text = " ".join(seen.split())
        if len(text) > SEEN_CHARS:
            text = f"[...] {text[-SEEN_CHARS:]}"  # what came last says why
        self.findings.append(Finding(what=what, held=held, seen=text))
        sys.stdout.write(f"{'ok  ' if held else 'FAIL'}  {what}: {text}\n")
        sys.stdout.flush()

    @property
    def worker(self) -> Mapping[str, Any]:
        """What `ps` says of the worker."""
        told: Mapping[str, Any] = self.stack.operator.workers(self.deployment)[0]["worker"]
        return told

    @property
    def name(self) -> str:
        """The devices and the way, as a section of the report is called."""
        _, _, name = str(self.worker["device"]).partition(" (")
        return f"{name.removesuffix(')')}, {self.weights}"


Check = Callable[[Trial], tuple[bool, str]]


def warm(trial: Trial) -> tuple[bool, str]:
    """Without this there is nothing to ask."""
    trial.stack.wait_warm(trial.deployment, timeout_s=WARM_S)
    worker = trial.worker
    missing = [each for each in worker["isolation_missing"] if each.startswith("shared weights")]
    had = f"the first executor found: {worker['device']}; weights are {worker['weights']} {' '.join(missing)}"
    return worker["weights"] == trial.weights, had


def _walls(trial: Trial) -> tuple[bool, str]:
    worker = trial.worker
    missing = "; ".join(worker["isolation_missing"])
    return worker["isolation"] != "process", f"level {worker['isolation']} {missing}"


def _same(name: str) -> Check:
    """Whether a block gives remotely what it gave at home, on such a device."""

    def check(trial: Trial) -> tuple[bool, str]:
        told = trial.client.run(cells.compared(name))
        exact = "bit for bit" if told["equal"] else f"up to {told['difference']:.3g}"
        return told["close"], f"as locally, {exact}"

    return check


def _edits(trial: Trial) -> tuple[bool, str]:
    sums = [trial.client.run(cells.EDIT)["total"] for _ in range(2)]
    after = trial.client.run(cells.compared("trace"))
    held = sums[0] == sums[1] and after["close"]
    return held, f"two requests that double the embedding saw the sums {sums[0]} and {sums[1]}"


def _restored(trial: Trial) -> tuple[bool, str]:
    """Two rows that changed places are seen, put back, and charged to who did it; the next one is charged nothing."""
    before = trial.client.run(cells.SWAP)["meta"]
    after = trial.client.run(cells.SWAP)["meta"]
    served = trial.client.run(cells.compared("trace"))
    held = before["restored_tensors"] == after["restored_tensors"] == 1 and served["close"]
    return held, f"restored {before['restored_tensors']} storage in {before['restore_s']:.3f} s"


def _settling(trial: Trial) -> tuple[bool, str]:
    """What looking for changes takes when there are none."""
    told = [trial.client.run(cells.SETTLED)["restore_s"] for _ in range(5)]
    size = trial.worker["weights_bytes"]
    took = statistics.median(told)
    return (
        True,
        f"{took * 1e3:.1f} ms for {size / 1e6:.1f} MB of weights, {size / took / 1e9:.1f} GB/s",
    )


def _killed(trial: Trial) -> tuple[bool, str]:
    """A kernel that does not end: the request ends at its limit, the executor goes, and its memory comes back."""
    before = trial.client.run(cells.FREE)["free"]
    began = time.monotonic()
    said = _failure(trial.client, cells.endless(gpu=trial.device == "cuda"))
    ended = time.monotonic()
    after = trial.client.run(cells.FREE)["free"]
    answered = time.monotonic()
    served = trial.client.run(cells.compared("trace"))
    lacking = max(one - other for one, other in zip(before, after, strict=True))
    held = "wall time" in said and lacking <= _SLACK_BYTES and served["close"]
    return held, (
        f"ended after {ended - began:.1f} s ({said[:160]!r}); the next request had its answer "
        f"{answered - ended:.1f} s later, with {lacking / 1e6:.0f} MB less free than before"
    )


def _out_of_memory(trial: Trial) -> tuple[bool, str]:
    said = _failure(trial.client, cells.GREEDY)
    told = said[max(0, said.find("memory")) :]
    served = trial.client.run(cells.compared("trace"))
    return "GPU" in told and "memory" in told and served["close"], told


def _host_memory(trial: Trial) -> tuple[bool, str]:
    """The host's is limited apart from the device's: address space that a driver reserves must not count."""
    said = _failure(trial.client, cells.GREEDY_AT_HOME)
    words = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "memory ran out")
    return any(each in said for each in words), said[-200:]


def _gpu_limit(trial: Trial) -> tuple[bool, str]:
    """A token's limit of GPU memory ends a request that takes more, though the GPU has it."""
    limits = {"wall_s": WALL_S, "gpu_memory_bytes": _GPU_LIMIT_BYTES}
    environ = trial.stack.client_environ(
        trial.stack.token(f"limited-{trial.deployment}", limits=limits)
    )
    with ClientProcess(environ, trial.folder / f"limited-{trial.deployment}") as client:
        client.run(cells.begin(str(trial.folder / cells.KEPT)))
        said = _failure(client, cells.OVER_THE_LIMIT)
    return "limit" in said and "memory" in said, said[-300:]


def _latency(trial: Trial) -> tuple[bool, str]:
    told = trial.client.run(cells.timed(ROUNDS), timeout_s=600.0)
    p50, p95 = statistics.median(told["remote"]), statistics.quantiles(told["remote"], n=20)[-1]
    return True, (
        f"one client without pause: p50 {p50:.2f} s, p95 {p95:.2f} s; locally {statistics.median(trial.local) * 1e3:.1f} ms; "
        f"the engine's part p50 {statistics.median(told['runtime']) * 1e3:.0f} ms"
    )


def _nodes(trial: Trial) -> tuple[bool, str]:
    told = trial.client.run(cells.NODES)
    return True, f"opened: {', '.join(told['opened']) or 'none'}"


def _caches(trial: Trial) -> tuple[bool, str]:
    told = trial.client.run(cells.CACHES)
    return told["own"] and not told["others"], (
        f"a kernel compiled at run time: {told['compiled']}; in the executor's own folder: {', '.join(told['left']) or 'nothing'}; "
        f"folders beside it could {'be' if told['others'] else 'not be'} written"
    )


VALUES: Final = (
    ("isolation with a GPU", _walls),
    ("values of a trace", _same("trace")),
    ("greedy generation", _same("generation")),
    ("gradients", _same("gradient")),
    ("weights after requests that wrote into them", _edits),
)
SHARING: Final = (
    ("weights after two rows changed places", _restored),
    ("time to look for changes", _settling),
)
LIMITS: Final = (
    ("nodes of the driver", _nodes),
    ("caches of compilers", _caches),
    ("a request with an endless kernel", _killed),
    ("a request beyond the GPU's memory", _out_of_memory),
    ("a request beyond its memory on the host", _host_memory),
)
ON_GPUS: Final = (("a request beyond its limit of GPU memory", _gpu_limit),)
LATENCY: Final = (("latency of a tiny trace", _latency),)


def questions(trial: Trial) -> list[tuple[str, Check]]:
    """What is asked once a worker is warm."""
    sharing = SHARING if trial.weights == "shared" else ()
    counted = ON_GPUS if trial.device == "cuda" else ()  # a stand-in counts no memory
    return [*VALUES, *sharing, *LIMITS, *counted, *LATENCY]


def _failure(client: ClientProcess, cell: str) -> str:
    """What the researcher is told of a request that fails."""
    try:
        client.run(cell, timeout_s=300.0)
    except CellFailed as error:
        return f"{error.text}\n{error.output}"
    return "it did not fail"
