"""What the walls cost: a tiny trace through an engine with all of them, and through one that lacks every wall that can be left out.

Both engines run in this process, with the same model and the same request, in turns of a few requests: whatever else slows this
machine down slows down both, and the forks for its next executors slow down the engine that they belong to. What is measured is `Engine.run`, from the request's bytes to the result's. Executors are ready ahead of need, so
most of the jail is put up while nobody waits; what remains of it lies in the request itself (system calls that are looked at, the watch) and
in the forks for the next ones, which use the same cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

from nnsight import TransformersModel

from edif_hpc.testing.leaky_zygote import launching
from edif_hpc.testing.models import build_tiny_gpt2
from edif_hpc.worker.engine.launch import Launch, launched
from edif_hpc.worker.engine.model import selftest
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import EngineSpec, Job, Level, Saved

_KEY = (
    "nnsight.modeling.transformers.TransformersModel:"
    '{"repo_id": "edif/tiny", "revision": null, "task": "text-generation"}'
)
#: All but the session: where the kernel gives each its share of the processors, it is an advantage on a busy machine.
WALLS = frozenset(
    "namespaces privileges limits parent landlock seccomp watch".split()  # noqa: SIM905 - a list of words
)
_TURN = 20
#: Of each turn; meanwhile the other engine fills its pool again.
_WARM_UP = 3


async def _engine(model: Path, scratch: Path, launch: Launch) -> Engine:
    spec = EngineSpec(model_key=_KEY, source=str(model), scratch=scratch, floor=Level.PROCESS)
    engine = Engine(spec, launch)
    info = await engine.start()
    print(f"  {scratch.name}: {info.isolation.level}, steps: {', '.join(info.isolation.steps)}")
    return engine


async def _once(engine: Engine, blob: bytes) -> float:
    job = Job(request_id="bench", attempt=1, blob=blob, compress=True, model_key=_KEY)
    began = perf_counter()
    outcome = await engine.run(job)
    took = perf_counter() - began
    if not isinstance(outcome, Saved):
        raise TypeError(f"a request of the bench failed: {outcome}")
    return took


async def measure(folder: Path, count: int) -> dict[str, list[float]]:
    """Run the request so many times in each engine; return the seconds."""
    model = build_tiny_gpt2(folder / "model")
    blob = selftest.capture(TransformersModel(str(model), task="text-generation", dispatch=True))
    engines: dict[str, Engine] = {}
    try:
        for name, launch in (("walls", launched), ("no walls", launching(WALLS))):
            engines[name] = await _engine(model, folder / name, launch)
        times: dict[str, list[float]] = {name: [] for name in engines}
        while len(times["no walls"]) < count:
            for name, engine in engines.items():
                turn = [await _once(engine, blob) for _ in range(_WARM_UP + _TURN)]
                times[name] += turn[_WARM_UP:]
        return times
    finally:
        for engine in engines.values():
            await engine.stop()


def main(argv: list[str]) -> int:
    """`jail [--count N]`."""
    parser = argparse.ArgumentParser(prog="bench jail", description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    given = parser.parse_args(argv)
    print(f"tiny GPT-2, one request at a time, in turns of {_TURN}, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory(prefix="edif-bench-") as folder:
        times = asyncio.run(measure(Path(folder), given.count))
    p50 = {name: statistics.median(each) for name, each in times.items()}
    for name, each in times.items():
        p95 = statistics.quantiles(each, n=20)[-1]
        print(f"  {name:<10} p50 {p50[name] * 1e3:6.2f} ms   p95 {p95 * 1e3:6.2f} ms")
    print(f"  the walls add {(p50['walls'] - p50['no walls']) * 1e3:+.2f} ms to the p50")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
