"""The relay at rest: processes, memory, and how long it takes from exec to its first answer."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from edif_hpc.testing.stack import Stack


def main(argv: list[str]) -> int:
    """`relay [--starts N]`."""
    parser = argparse.ArgumentParser(prog="bench relay", description=__doc__)
    parser.add_argument("--starts", type=int, default=5)
    given = parser.parse_args(argv)
    starts = []
    with (
        tempfile.TemporaryDirectory(prefix="edif-bench-") as folder,
        Stack(root=Path(folder) / "stack") as stack,
    ):
        for _ in range(given.starts):
            stack.stop_relay()
            began = time.perf_counter()
            stack.start_relay()
            starts.append(time.perf_counter() - began)
        relays = stack.processes("relay")
        memory = sum(_rss_bytes(each.pid) for each in relays)
        print("the relay at rest")
        print(
            f"  processes {len(relays)}   memory {memory / 2**20:.0f} MiB   up in {statistics.median(starts):.2f} s"
        )
    return 0


def _rss_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
