"""Large results: how long the unmodified client waits for one, beside what cannot be saved, and what memory it takes.

The floor is measured in the same run on the same bytes, one step after the other: `torch.save`, zstd level 1, one copy from
process to process, and the client's own decompression and `torch.load`. The total is the whole `with model.trace(...,
remote=True)` block, and may be below the floor's sum, since the steps overlap. For a bucket, the row adds what the store
itself needs on this machine to take and give the same bytes, by plain PUTs and one GET. The tensor is made of noise that repeats
farther apart than zstd looks back, so it compresses like activations and is made in no time.

Memory: the worker's is its peak; the executor's is its peak beyond the tensors and beyond what a tiny request takes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from edif_hpc.objects.base import PART_BYTES, UploadedPart
from edif_hpc.objects.s3 import Place, S3Store
from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing.ceph import S3Server, serve_s3
from edif_hpc.testing.models import build_tiny_gpt2
from edif_hpc.testing.stack import Stack

_REPO = "edif/tiny-gpt2"
_STEPS = ("save", "zstd", "copy", "decompress", "load")
_BUCKET = "results"
_MIB = 1 << 20
_BLOCK_MIB = 4  #: what a client's `run(1)` saves

_CLIENT = """
import json, sys, time
import torch
from nnsight import CONFIG, TransformersModel
CONFIG.APP.REMOTE_LOGGING = False
model = TransformersModel("edif/tiny-gpt2", task="text-generation")
def run(blocks):
    began = time.perf_counter()
    with model.trace("hello", remote=True) as tracer:
        big = torch.randn(1 << 20).repeat(blocks).save()
    took = time.perf_counter() - began
    if big.numel() != blocks << 20:
        raise ValueError(f"{big.numel()} values came back")
    return took, tracer.backend.meta
for line in sys.stdin:
    took, meta = run(int(line))
    print(json.dumps({"seconds": took, "peak": meta["peak_rss_bytes"]}), flush=True)
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
    out = bytearray(sum(map(len, pieces)))
    rest = memoryview(out)
    while count := theirs.recv_into(rest):
        rest = rest[count:]
    sender.join()
    return out
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
        return Sample(seconds=told["seconds"], executor_peak_bytes=told["peak"])

    def end(self) -> None:
        """End it."""
        self._process.communicate()


def floor(blocks: int, threads: int) -> dict[str, float]:
    """Seconds of each step that cannot be saved."""
    command = [sys.executable, "-c", _FLOOR, str(blocks), str(threads)]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    steps: dict[str, float] = json.loads(told.stdout)
    return steps


@dataclass(frozen=True, kw_only=True)
class Store:
    """A kind of store: the relay's settings for it, and the server if it is one."""

    name: str
    settings: dict[str, Any]
    server: S3Server | None = None

    def seconds_for(self, size_bytes: int) -> dict[str, float]:
        """What the server itself needs for so many bytes; nothing for a directory."""
        if self.server is None:
            return {}
        return asyncio.run(_put_and_get(self.server.place(_BUCKET, prefix="floor/"), size_bytes))


async def _put_and_get(place: Place, size_bytes: int) -> dict[str, float]:
    store, data = await S3Store.connect(place), os.urandom(PART_BYTES)
    upload = await store.begin("floor/1")
    count = max(1, size_bytes // PART_BYTES)
    urls = [
        (await store.part_urls(upload, each, 1, base_url=""))[0] for each in range(1, count + 1)
    ]
    began = time.perf_counter()
    etags = await asyncio.to_thread(_put_all, urls, data)
    parts = [UploadedPart(number=number, etag=etag) for number, etag in enumerate(etags, start=1)]
    await store.complete(upload, parts, count * PART_BYTES)
    put = time.perf_counter() - began
    url = await store.read_url("floor/1", base_url="")
    began = time.perf_counter()
    await asyncio.to_thread(_get, url)
    took = {"put": put, "get": time.perf_counter() - began}
    await store.delete("floor")
    await store.close()
    return took


def _put_all(urls: list[str], data: bytes) -> list[str]:
    with httpx.Client(timeout=60.0) as http:
        return [http.put(url, content=data).headers["etag"].strip('"') for url in urls]


def _get(url: str) -> None:
    with httpx.stream("GET", url, timeout=60.0) as answer:
        for _ in answer.iter_raw():
            pass


@contextmanager
def _store(name: str, folder: Path) -> Iterator[Store]:
    if name == "directory":
        yield Store(name=name, settings={})
        return
    with serve_s3(folder / "ceph") as server:
        server.make_bucket(_BUCKET)
        yield Store(name=name, settings=dict(server.settings(_BUCKET)), server=server)


def _measure(store: Store, folder: Path, sizes_mib: list[int], rounds: int) -> None:
    model = build_tiny_gpt2(folder / "model")
    told = {"log_level": "warning", **store.settings}
    engine = EngineFacts(threads=1, log_level="warning")
    with Stack(
        root=folder / "stack", models={_REPO: model}, settings=told, engine=engine
    ) as stack:
        stack.deploy(_REPO)
        stack.launch()
        stack.wait_warm()
        client = Client(stack.client_environ(stack.token("bench")))
        tiny = client.fetch(1)
        for size in sizes_mib:
            for _ in range(rounds):
                least = floor(size // _BLOCK_MIB, 1)
                least |= store.seconds_for(size * _MIB)
                _print_row(store.name, size, least, client.fetch(size // _BLOCK_MIB), tiny)
        client.end()
        print(f"  {store.name:<9} peak memory: {_peaks(stack)}")


def _print_row(
    store: str, size_mib: int, steps: dict[str, float], sample: Sample, tiny: Sample
) -> None:
    least = sum(steps[name] for name in _STEPS)
    parts = " + ".join(f"{name} {steps[name]:.2f}" for name in _STEPS)
    store_s = sum(steps.get(name, 0.0) for name in ("put", "get"))
    of_store = (
        f"; {sample.seconds / (least + store_s):4.2f} with the store's own {store_s:.2f} s"
        if store_s
        else ""
    )
    beyond = sample.executor_peak_bytes - tiny.executor_peak_bytes - (size_mib - _BLOCK_MIB) * _MIB
    print(
        f"  {store:<9} {size_mib:5d} MiB   {sample.seconds:6.2f} s   floor {least:6.2f} s ({parts})   "
        f"ratio {sample.seconds / least:4.2f}{of_store}   executor beyond its tensors {beyond / _MIB:.0f} MiB"
    )


def _peaks(stack: Stack) -> str:
    found = [each for kind in ("worker", "relay") for each in stack.processes(kind)]
    return ", ".join(f"{each.kind} {_high_water_bytes(each.pid) / _MIB:.0f} MiB" for each in found)


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
    print(f"results of an unmodified nnsight client, {os.cpu_count()} cores; whole trace block")
    sizes = [int(each) for each in given.sizes.split(",")]
    for name in given.stores.split(","):
        with (
            tempfile.TemporaryDirectory(prefix="edif-bench-") as folder,
            _store(name, Path(folder)) as store,
        ):
            _measure(store, Path(folder), sizes, given.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
