"""Tries on this machine's GPU what is promised of one, with real processes and the unmodified client: `scripts/check-gpu`.

A tiny model is computed by a plain nnsight process, and then by a worker of a whole edif-hpc beside it (`Stack`) on the same
GPU. What is asked is in `gpu_cells`: whether the numbers are the same, whether weights survive requests that write into them,
and above all what becomes of the memory of an executor that is killed while a kernel of its runs. Each answer is a line of
the report, with what was seen; a report with a failure is as useful as one without.

    scripts/check-gpu [--report docs/reference/gpu-NAME.md]

The exit code is 0 if all held, 1 if something did not, 2 if there is no GPU. `--device cpu:0` runs all of it on the CPU, by
the same way of private copies: that is how the check itself is tested.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from edif_hpc.clock import SystemClock
from edif_hpc.slurm.devices import driver_variables, vendor_here
from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing import gpu_cells as cells
from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.models import build_tiny_gpt2, gpt2_small_shape
from edif_hpc.testing.stack import MODEL, Stack

NO_GPU: Final = 2
#: Wall time of a request; a killed one may take so long to be noticed.
WALL_S: Final = 15.0
ROUNDS: Final = 20
WARM_S: Final = 300.0
SEEN_CHARS: Final = 800
#: Where the driver of each vendor says its version.
_DRIVERS: Final = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
MODELS: Final = {"tiny": build_tiny_gpt2, "small": gpt2_small_shape}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report."""

    what: str
    held: bool
    seen: str


@dataclass(kw_only=True)
class Trial:
    """A worker on the device, a client beside it, and what is found."""

    device: str
    stack: Stack
    client: ClientProcess
    findings: list[Finding] = field(default_factory=list)

    def ask(self, what: str, check: Callable[[Trial], tuple[bool, str]]) -> None:
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
        told: Mapping[str, Any] = self.stack.operator.workers("tiny")[0]["worker"]
        return told


# -- the checks ----------------------------------------------------------------------------------------------------------


def _warm(trial: Trial) -> tuple[bool, str]:
    trial.stack.wait_warm(timeout_s=WARM_S)
    return True, f"the first executor found: {trial.worker['device']}"


def _walls(trial: Trial) -> tuple[bool, str]:
    worker = trial.worker
    missing = "; ".join(worker["isolation_missing"])
    return worker["isolation"] != "process", f"level {worker['isolation']} {missing}"


def _same(name: str) -> Callable[[Trial], tuple[bool, str]]:
    """Whether a block gives remotely what it gave in the client's own process, on the same device."""

    def check(trial: Trial) -> tuple[bool, str]:
        told = trial.client.run(cells.compared(name))
        exact = "bit for bit" if told["equal"] else f"up to {told['difference']:.3g}"
        return told["close"], f"as locally on {told['device']}, {exact}"

    return check


def _weights(trial: Trial) -> tuple[bool, str]:
    sums = [trial.client.run(cells.EDIT)["total"] for _ in range(2)]
    after = trial.client.run(cells.compared("trace"))
    held = sums[0] == sums[1] and after["close"]
    return held, f"two requests that double the embedding saw the sums {sums[0]} and {sums[1]}"


def _killed(trial: Trial) -> tuple[bool, str]:
    """A kernel that does not end: the request ends at its limit, the executor goes, and its memory comes back."""
    before = trial.client.run(cells.MEMORY)["free"]
    began = time.monotonic()
    said = _failure(trial, cells.endless(gpu=trial.device == "cuda"))
    ended = time.monotonic()
    back = trial.client.run(cells.memory_back(before))
    served = trial.client.run(cells.compared("trace"))
    held = "limit of wall time" in said and back["back"] and served["close"]
    return held, (
        f"ended after {ended - began:.1f} s of {WALL_S:g} s allowed ({said[:80]!r}); memory back {back['seconds']:.2f} s "
        f"later; the next request had its answer {time.monotonic() - ended:.1f} s after the end"
    )


def _out_of_memory(trial: Trial) -> tuple[bool, str]:
    said = _failure(trial, cells.GREEDY)
    told = said[said.find("The memory of the GPU ran out") :]
    served = trial.client.run(cells.compared("trace"))
    return told.startswith("The memory of the GPU") and served["close"], told


def _host_memory(trial: Trial) -> tuple[bool, str]:
    """The host's is limited apart from the device's: address space that a driver reserves must not count."""
    said = _failure(trial, cells.GREEDY_AT_HOME)
    words = ("MemoryError", "can't allocate memory", "Cannot allocate memory", "memory ran out")
    return any(each in said for each in words), said[-200:]


def _latency(trial: Trial) -> tuple[bool, str]:
    told = trial.client.run(cells.timed(ROUNDS), timeout_s=600.0)
    p50, p95 = statistics.median(told["remote"]), statistics.quantiles(told["remote"], n=20)[-1]
    local = statistics.median(told["local"])
    return True, (
        f"one client without pause: p50 {p50:.2f} s, p95 {p95:.2f} s; locally {local * 1e3:.1f} ms; the "
        f"engine's part p50 {statistics.median(told['runtime']) * 1e3:.0f} ms"
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


#: Without the first there are no others.
CHECKS: Final = (
    ("a worker on it becomes warm", _warm),
    ("isolation with a GPU", _walls),
    ("values of a trace", _same("trace")),
    ("greedy generation", _same("generation")),
    ("gradients", _same("gradient")),
    ("weights after requests that wrote into them", _weights),
    ("nodes of the driver", _nodes),
    ("caches of compilers", _caches),
    ("a request with an endless kernel", _killed),
    ("a request beyond the GPU's memory", _out_of_memory),
    ("a request beyond its memory on the host", _host_memory),
    ("latency of a tiny trace", _latency),
)


def _failure(trial: Trial, cell: str) -> str:
    """What the researcher is told of a request that fails."""
    try:
        trial.client.run(cell, timeout_s=300.0)
    except CellFailed as error:
        return f"{error.text}\n{error.output}"
    return "it did not fail"


# -- the report ----------------------------------------------------------------------------------------------------------


def report(facts: Mapping[str, Any], findings: list[Finding]) -> str:
    """The page."""
    day = datetime.fromtimestamp(SystemClock().wall(), UTC).strftime("%Y-%m-%d")
    held = sum(each.held for each in findings)
    lines = [
        f"# {facts['device']}",
        "",
        f"What `scripts/check-gpu` found on {day}: {held} of {len(findings)} hold.",
        "",
        "| fact | value |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "| what | held | seen |",
        "|---|---|---|",
        *(
            f"| {each.what} | {'yes' if each.held else '**no**'} | {each.seen.replace('|', '/')} |"
            for each in findings
        ),
    ]
    return "\n".join(lines) + "\n"


def _facts(trial: Trial) -> dict[str, Any]:
    told = trial.client.run(cells.FACTS)
    told.pop("output")
    versions = [Path(each).read_text().splitlines()[0] for each in _DRIVERS if Path(each).exists()]
    variables = driver_variables(os.environ, vendor_here())
    return told | {
        "driver": " ".join(versions) or "none that tells its version",
        "variables passed on": ", ".join(variables) or "none",
        "kernel of Linux": platform.release(),
        "CPU cores": os.cpu_count(),
    }


@contextmanager
def trial_of(device: str, model: str, folder: Path) -> Iterator[Trial]:
    """A worker that serves a model on the device, and a client that has computed it there before.

    The client is first: what it takes of the device's memory is there when the first executor looks.
    """
    source = MODELS[model](folder / "model")
    settings = {"log_level": "warning"}
    engine = EngineFacts(log_level="info")
    with Stack(
        root=folder / "stack", models={MODEL: source}, settings=settings, engine=engine
    ) as stack:
        environ = stack.client_environ(stack.token("ada", max_wall_s=WALL_S))
        with ClientProcess(environ, folder / "client") as client:
            client.run(cells.LOCAL, timeout_s=300.0)
            stack.deploy(MODEL, device=device)
            stack.launch()
            yield Trial(device=device, stack=stack, client=client)


def main(argv: list[str]) -> int:
    """`check-gpu [--report FILE] [--model tiny|small] [--device cuda|cpu:0]`."""
    parser = argparse.ArgumentParser(prog="check-gpu", description=__doc__)
    parser.add_argument("--report", type=Path, metavar="FILE")
    parser.add_argument("--model", choices=[*MODELS], default="tiny")
    parser.add_argument("--device", choices=["cuda", "cpu:0"], default="cuda")
    given = parser.parse_args(argv)
    if given.device == "cuda" and vendor_here() == "none":
        sys.stderr.write("check-gpu: no GPU here (neither /dev/nvidiactl nor /dev/kfd)\n")
        return NO_GPU
    with (
        tempfile.TemporaryDirectory(prefix="edif-gpu-") as folder,
        trial_of(given.device, given.model, Path(folder)) as trial,
    ):
        for what, check in CHECKS:
            trial.ask(what, check)
            if not trial.findings[0].held:
                break
        page = report(_facts(trial), trial.findings)
    if given.report is not None:
        given.report.write_text(page)
    sys.stdout.write(f"\n{page}")
    return 0 if all(each.held for each in trial.findings) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
