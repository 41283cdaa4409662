"""Large results: how long the unmodified client waits for one, beside what cannot be saved, and what memory it takes.

The floor is measured in the same run on the same bytes, one step after the other: `torch.save`, zstd level 1, one copy from
process to process, and the client's own decompression and `torch.load`. The total is the whole `with model.trace(...,
remote=True)` block, and may be below the floor's sum, since the steps overlap. The tensor is made of noise that repeats
farther apart than zstd looks back, so it compresses like activations and is made in no time.

Memory: the worker's is its peak; the executor's is its peak beyond the tensors and beyond what a tiny request takes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing.ceph import serve_s3
from edif_hpc.testing.models import build_tiny_gpt2
from edif_hpc.testing.stack import Stack

_REPO = "edif/tiny-gpt2"
_PARTS = ("save", "zstd", "copy", "decompress", "load")
_MIB = 1 << 20

_CLIENT = """
import json, sys, time
import torch
from nnsight import CONFIG, TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend
CONFIG.APP.REMOTE_LOGGING = False
model = TransformersModel("edif/tiny-gpt2", task="text-generation")
def run(blocks):
    backend = RemoteBackend(model.to_model_key(), blocking=True) if hasattr(model, "to_model_key") else None
    began = time.perf_counter()
    with model.trace("hello", remote=True) as tracer:
        big = torch.randn(1 << 20).repeat(blocks).save()
    took = time.perf_counter() - began
    assert big.numel() == blocks << 20
    return took, tracer
for line in sys.stdin:
    took, tracer = run(int(line))
    meta = getattr(getattr(tracer, "backend", None), "meta", None) or {}
    print(json.dumps({"seconds": took, "peak": meta.get("peak_rss_bytes")}), flush=True)
"""

_FLOOR = """
import io, json, socket, sys, threading, time
import torch, zstandard
torch.set_num_threads(int(sys.argv[2]))
value, took = {"big": torch.randn(1 << 20).repeat(int(sys.argv[1]))}, {}
def step(name, work):
    began = time.perf_counter()
    result = work()
    took[name] = time.perf_counter() - began
    return result
def save():
    out = io.BytesIO()
    torch.save(value, out)
    return out.getbuffer()
def compress():
    frame, out = zstandard.ZstdCompressor(level=1).compressobj(size=saved.nbytes), []
    for start in range(0, saved.nbytes, 1 << 20):
        out.append(frame.compress(saved[start:start + (1 << 20)]))
    out.append(frame.flush())
    return out
def copy():
    ours, theirs = socket.socketpair()
    def send():
        for each in pieces:
            ours.sendall(each)
        ours.close()
    sender = threading.Thread(target=send)
    sender.start()
    out = io.BytesIO()
    while data := theirs.recv(1 << 20):
        out.write(data)
    sender.join()
    return out.getvalue()
saved = step("save", save)
pieces = step("zstd", compress)
content = step("copy", copy)
del saved, pieces
content = step("decompress", lambda: zstandard.ZstdDecompressor().decompress(content))
step("load", lambda: torch.load(io.BytesIO(content), map_location="cpu", weights_only=False))
print(json.dumps(took))
"""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One result."""

    seconds: float
    executor_peak_bytes: int


class Client:
    """The unmodified nnsight client in a process of its own."""

    def __init__(self, environ: dict[str, str]) -> None:
        command = [sys.executable, "-W", "ignore", "-c", _CLIENT]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ
        )

    def fetch(self, blocks: int) -> Sample:
        """Run a trace that saves so many blocks of 4 MiB."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the client has no pipes")
        self._process.stdin.write(f"{blocks}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the client of the bench ended with {self._process.wait()}")
        told = json.loads(line)
        return Sample(seconds=told["seconds"], executor_peak_bytes=told["peak"] or 0)

    def end(self) -> None:
        """End it."""
        self._process.communicate()


def floor(blocks: int, threads: int) -> dict[str, float]:
    """Seconds of each step that cannot be saved."""
    command = [sys.executable, "-c", _FLOOR, str(blocks), str(threads)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    steps: dict[str, float] = json.loads(told.stdout)
    return steps


@contextmanager
def _store(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """The relay's settings for a kind of store."""
    if name == "directory":
        yield {}
        return
    with serve_s3(folder / "ceph") as server:
        yield server.settings(server.make_bucket("results"))


def _measure(store: str, sizes_mib: list[int], rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="edif-bench-") as name, _store(store, Path(name)) as settings:
        folder = Path(name)
        model = build_tiny_gpt2(folder / "model")
        told = {"log_level": "warning", **settings}
        engine = EngineFacts(threads=1, log_level="warning")
        with Stack(root=folder / "stack", models={_REPO: model}, settings=told, engine=engine) as stack:
            stack.deploy(_REPO)
            stack.launch()
            stack.wait_warm()
            client = Client(stack.client_environ(stack.token("bench")))
            tiny = client.fetch(1)
            for size in sizes_mib:
                _print_size(store, size, rounds, client, tiny)
            client.end()
            print(f"  peak memory: {_peaks(stack)}")  # noqa: T201


def _print_size(store: str, size_mib: int, rounds: int, client: Client, tiny: Sample) -> None:
    blocks = size_mib // 4
    pairs = [(floor(blocks, 1), client.fetch(blocks)) for _ in range(rounds)]
    for steps, sample in pairs:
        least = sum(steps.values())
        parts = " + ".join(f"{name} {steps[name]:.2f}" for name in _PARTS)
        beyond = sample.executor_peak_bytes - tiny.executor_peak_bytes - size_mib * _MIB
        print(  # noqa: T201
            f"  {store:<9} {size_mib:5d} MiB   {sample.seconds:6.2f} s   floor {least:6.2f} s ({parts})   "
            f"ratio {sample.seconds / least:4.2f}   executor beyond its tensors {beyond / _MIB:.0f} MiB"
        )


def _peaks(stack: Stack) -> str:
    told = []
    for kind in ("worker", "relay"):
        for each in stack.processes(kind):
            told.append(f"{kind} {_high_water_bytes(each.pid) / _MIB:.0f} MiB")
    return ", ".join(told)


def _high_water_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main(argv: list[str]) -> int:
    """`results [--sizes MIB,...] [--stores NAME,...] [--rounds N]`."""
    parser = argparse.ArgumentParser(prog="bench results", description=__doc__)
    parser.add_argument("--sizes", default="100,1024", help="in MiB, with commas between")
    parser.add_argument("--stores", default="directory,s3", help="directory, s3")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args(argv)
    print(f"results of an unmodified nnsight client, {os.cpu_count()} cores; whole trace block")  # noqa: T201
    for store in given.stores.split(","):
        _measure(store, [int(each) for each in given.sizes.split(",")], given.rounds)
    return 0
