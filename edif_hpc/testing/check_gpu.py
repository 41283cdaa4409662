"""Tries on this machine's GPUs what is promised of them, with real processes and the unmodified client: `scripts/check-gpu`.

A tiny model is computed by a plain nnsight process, which ends, and then by workers of a whole edif-hpc (`Stack`) on the same
GPU: one whose executors have copies of the weights, one whose executors share them, and, where there are several GPUs, one over
all of them. What is asked is in `gpu_checks`: whether the numbers are the same, whether weights survive requests that write
into them, whether limits hold, how long it takes, and above all what becomes of the memory of an executor that is killed
while a kernel of its runs. Each answer is a line of the report, with what was seen; a report with a failure is as useful
as one without.

    scripts/check-gpu [--report docs/reference/gpu-NAME.md]

The exit code is 0 if all held, 1 if something did not, 2 if there is no GPU. `--device cpu:0` runs all of it on the CPU, by
the same ways with a stand-in: that is how the check itself is tested.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from edif_hpc.clock import SystemClock
from edif_hpc.domain.deployment import ON_DEVICES
from edif_hpc.slurm.devices import driver_variables, vendor_here
from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing import gpu_cells as cells
from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.gpu_checks import ROUNDS, WALL_S, Trial, questions, warm
from edif_hpc.testing.gpu_report import Finding, report
from edif_hpc.testing.models import build_tiny_gpt2, gpt2_small_shape
from edif_hpc.testing.stack import MODEL, Stack
from edif_hpc.testing.wait import wait_until

NO_GPU: Final = 2
GONE_S: Final = 120.0
#: Where the driver of each vendor says its version.
_DRIVERS: Final = ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")
_MODES: Final = ("--query-gpu=compute_mode,mig.mode.current", "--format=csv,noheader")
MODELS: Final = {"tiny": build_tiny_gpt2, "small": gpt2_small_shape}


@dataclass(kw_only=True)
class Bench:
    """An edif-hpc without workers, and what was computed without it."""

    device: str
    folder: Path
    stack: Stack
    environ: dict[str, str]
    home: dict[str, Any]

    @property
    def count(self) -> int:
        """How many GPUs there are."""
        return int(self.home["facts"]["devices"])

    @contextmanager
    def trial(self, weights: str, *, count: int = 1) -> Iterator[Trial]:
        """A worker that serves the model in one way, for the duration of the context."""
        name = f"{weights}-{count}"
        self.stack.deploy(MODEL, name=name, device=self.device, weights=weights, gpus=count)
        launched = self.stack.launch(name)
        with ClientProcess(self.environ, self.folder / f"client-{name}") as client:
            client.run(cells.begin(str(self.folder / cells.KEPT)))
            yield Trial(
                deployment=name,
                device=self.device,
                weights=weights,
                folder=self.folder,
                stack=self.stack,
                client=client,
                local=self.home["local"],
            )
        self.stack.operator.call("DELETE", f"/deployments/{name}?force=true")
        wait_until(lambda: all(each.over for each in launched), GONE_S, "the worker is gone")

    def facts(self) -> dict[str, Any]:
        """What of this machine may matter."""
        found = [
            Path(each).read_text().splitlines()[0] for each in _DRIVERS if Path(each).exists()
        ]
        variables = driver_variables(os.environ, vendor_here())
        return dict(self.home["facts"]) | {
            "driver": " ".join(found) or "none that tells its version",
            "compute mode and MIG": compute_modes(),
            "variables passed on": ", ".join(variables) or "none",
            "kernel of Linux": platform.release(),
            "CPU cores": os.cpu_count(),
        }


@contextmanager
def bench_of(device: str, model: str, folder: Path, *, wall_s: float = WALL_S) -> Iterator[Bench]:
    """A relay that knows a model, and what that model gives at home; requests run for `wall_s` at most."""
    source = MODELS[model](folder / "model")
    settings = {"log_level": "warning"}
    engine = EngineFacts(log_level="info")
    with Stack(
        root=folder / "stack", models={MODEL: source}, settings=settings, engine=engine
    ) as stack:
        environ = dict(stack.client_environ(stack.token("ada", limits={"wall_s": wall_s})))
        with ClientProcess(environ, folder / "home") as client:
            home = client.run(cells.at_home(str(folder / cells.KEPT), ROUNDS), timeout_s=300.0)
        yield Bench(device=device, folder=folder, stack=stack, environ=environ, home=home)


def compute_modes() -> str:
    """What NVIDIA's tool says of each GPU: whether several processes may use it, and whether it is cut into parts."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown: no nvidia-smi here"
    done = subprocess.run([tool, *_MODES], capture_output=True, text=True, check=False, timeout=60)
    return (
        "; ".join(done.stdout.split("\n")).strip("; ") or done.stderr.strip() or "it says nothing"
    )


def ways(bench: Bench) -> list[tuple[str, int]]:
    """How executors may have weights on this machine, and on how many devices; a stand-in is as many as one likes."""
    several = bench.count if bench.device == "cuda" else 2
    return [(way, count) for count in sorted({1, several}) for way in ON_DEVICES]


def ask_all(bench: Bench, wanted: Sequence[tuple[str, int]]) -> dict[str, list[Finding]]:
    """Try these ways; return what was found, by section."""
    sections: dict[str, list[Finding]] = {}
    for weights, count in wanted:
        sys.stdout.write(f"\n{weights} weights, {count} x {bench.device}\n")
        with bench.trial(weights, count=count) as trial:
            trial.ask("a worker on it becomes warm, with weights that way", warm)
            name = f"{count} x {bench.device}, {weights}"
            if trial.findings[0].held:
                name = trial.name
                for what, check in questions(trial):
                    trial.ask(what, check)
            sections[name] = trial.findings
    return sections


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
        bench_of(given.device, given.model, Path(folder)) as bench,
    ):
        sections = ask_all(bench, ways(bench))
        day = datetime.fromtimestamp(SystemClock().wall(), UTC).strftime("%Y-%m-%d")
        page = report(bench.facts(), sections, day=day)
    if given.report is not None:
        given.report.write_text(page)
    sys.stdout.write(f"\n{page}")
    return 0 if all(each.held for found in sections.values() for each in found) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
