"""What a researcher waits for: a tiny trace by the unmodified client, one client and eight, beside a local run.

Relay, worker, executors and clients share this machine. Every client is a process of its own with the real nnsight; the
times are those of the whole `with model.trace(..., remote=True)` block. The local figure is the same block without
`remote`, in the same run. Beside the times stands where the processor's time went, per request: what a client spends in
itself (mostly httpx reading its certificates) is a floor that no server can go below.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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
began, worked = time.perf_counter(), time.process_time()
times = [once() for _ in range(count)]
worked = time.process_time() - worked
print(json.dumps({"times": times, "took": time.perf_counter() - began, "worked": worked}), flush=True)
sys.stdin.readline()
"""


def _clients(environ: dict[str, str], clients: int, count: int, how: str, stack: Stack) -> Row:
    """Run so many clients at once."""
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
    before = _worked(stack)
    for each in running:
        if each.stdin is not None:
            each.stdin.write("\n")
            each.stdin.flush()
    outs: list[dict[str, Any]] = [
        json.loads(each.stdout.readline()) for each in running if each.stdout is not None
    ]
    after = _worked(stack)
    for each in running:
        each.communicate("\n", timeout=60.0)
    times = [each for out in outs for each in out["times"]]
    return Row(
        times=times,
        rate=len(times) / max(out["took"] for out in outs),
        worked={"client": sum(out["worked"] for out in outs)}
        | {kind: after[kind] - before[kind] for kind in after},
    )


def _worked(stack: Stack) -> dict[str, float]:
    """Seconds of processor time of the relay, the worker, and the zygote with all executors that have ended."""
    seconds = dict.fromkeys(("relay", "worker", "executors"), 0.0)
    for each in stack.processes():
        kind = "executors" if each.kind in ("zygote", "executor") else each.kind
        if kind in seconds:
            fields = Path(f"/proc/{each.pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks = fields[11:15] if kind == "executors" else fields[11:13]  # with the reaped
            seconds[kind] += sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    return seconds


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    times: list[float]  #: seconds of each request
    rate: float  #: requests per second
    worked: dict[str, float]  #: seconds of processor time by kind of process

    def text(self, name: str) -> str:
        """For people."""
        p50, p95 = statistics.median(self.times), statistics.quantiles(self.times, n=20)[-1]
        line = f"  {name:<18} p50 {p50 * 1e3:6.1f} ms   p95 {p95 * 1e3:6.1f} ms   {self.rate:6.1f} req/s"
        parts = (f"{k} {v / len(self.times) * 1e3:.1f}" for k, v in self.worked.items() if v > 0)
        return f"{line}   processor ms each: {', '.join(parts)}"


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
            several = max(10, given.count // 4)
            for clients, count, how in (
                (1, given.count, "local"),
                (1, given.count, "remote"),
                (8, several, "remote"),
            ):
                row = _clients(environ, clients, count, how, stack)
                print(row.text(f"{how}, {clients} client{'s' if clients > 1 else ''}"), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
