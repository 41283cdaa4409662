"""What a researcher waits for: a tiny trace by the unmodified client, one client and eight, beside a local run.

Relay, worker, executors and clients share this machine. Every client is a process of its own with the real nnsight; the
times are those of the whole `with model.trace(..., remote=True)` block. The local figure is the same block without
`remote`, in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing.models import build_tiny_gpt2
from edif_hpc.testing.stack import Stack

_REPO = "edif/tiny-gpt2"

_CLIENT = """
import json, sys, time
from nnsight import CONFIG, TransformersModel
CONFIG.APP.REMOTE_LOGGING = False
count, local = int(sys.argv[1]), sys.argv[2] == "local"
model = TransformersModel("edif/tiny-gpt2", task="text-generation", **({"dispatch": True} if local else {}))
how = {} if local else {"remote": True}
def once():
    began = time.perf_counter()
    with model.trace("The quick brown fox", **how):
        logits = model.lm_head.output.save()
    return time.perf_counter() - began
for _ in range(3):
    once()
print("ready", flush=True)
sys.stdin.readline()
began = time.perf_counter()
times = [once() for _ in range(count)]
print(json.dumps({"times": times, "took": time.perf_counter() - began}), flush=True)
"""


def _clients(
    environ: dict[str, str], clients: int, count: int, how: str
) -> tuple[list[float], float]:
    """Latencies in seconds of all clients, and requests per second."""
    command = [sys.executable, "-W", "ignore", "-c", _CLIENT, str(count), how]
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environ,
        )
        for _ in range(clients)
    ]
    for each in running:
        if each.stdout is None or each.stdout.readline().strip() != "ready":
            raise RuntimeError(f"a client of the bench did not start (exit {each.wait()})")
    for each in running:
        if each.stdin is not None:
            each.stdin.write("\n")
            each.stdin.flush()
    outs: list[dict[str, Any]] = [
        json.loads(each.communicate(timeout=600.0)[0].strip().splitlines()[-1]) for each in running
    ]
    times = [each for out in outs for each in out["times"]]
    return times, len(times) / max(out["took"] for out in outs)


def _row(name: str, times: list[float], rate: float) -> str:
    cuts = statistics.quantiles(times, n=20)
    return f"  {name:<34} p50 {statistics.median(times) * 1e3:7.1f} ms   p95 {cuts[-1] * 1e3:7.1f} ms   {rate:6.1f} req/s"


def main(argv: list[str]) -> int:
    """`latency [--count N] [--executors N] [--threads N]`."""
    parser = argparse.ArgumentParser(prog="bench latency", description=__doc__)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument(
        "--executors", type=int, default=1, help="requests that the worker runs at a time"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="compute threads of an executor; 0: torch's choice"
    )
    parser.add_argument("--ready", type=int, default=2, help="executors held ready")
    given = parser.parse_args(argv)
    engine = EngineFacts(threads=given.threads, ready=given.ready, log_level="warning")
    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        model = build_tiny_gpt2(Path(folder) / "model")
        with Stack(
            root=Path(folder) / "stack",
            models={_REPO: model},
            settings={"log_level": "warning"},
            engine=engine,
        ) as stack:
            stack.deploy(_REPO, executors=given.executors)
            stack.launch()
            stack.wait_warm()
            level = stack.operator.workers("tiny")[0]["worker"]["isolation"]
            environ = stack.client_environ(stack.token("bench"))
            print(
                f"tiny GPT-2, unmodified nnsight client, {os.cpu_count()} cores (fsync per commit: yes, CURVE: yes, isolation: {level})"
            )
            print(_row("local, 1 client", *_clients(environ, 1, given.count, "local")))
            print(_row("remote, 1 client", *_clients(environ, 1, given.count, "remote")))
            print(
                _row(
                    "remote, 8 clients", *_clients(environ, 8, max(10, given.count // 4), "remote")
                )
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
