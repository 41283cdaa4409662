"""Every way for a job to end is told by its kind, and leaves the engine able to serve the next."""

# ruff: noqa: F841, T201 - what a block binds or prints is what the client gets back

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch

from edif_hpc.errors import EngineError, IsolationTooWeak
from edif_hpc.testing.processes import is_alive
from edif_hpc.testing.wait import wait_until, wait_until_async
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import MIB, FailureKind, Level, Limits
from edif_hpc.worker.engine.zygote import WARNINGS
from tests.integration.worker.conftest import Block, Reply, Service, serving, spec
from tests.integration.worker.test_fidelity import trace


async def still_serves(service: Service) -> None:
    assert (await service.send(trace)).saved.size > 0


# ---------------------------------------------------------------- what is printed


async def test_prints_and_warnings_come_as_lines(service: Service) -> None:
    def printing(model: Any, **where: Any) -> None:
        with model.trace("say something", **where):
            import sys
            import warnings

            print("one", 2)
            print("a\nb")
            print("to stderr", file=sys.stderr)
            warnings.warn("careful", stacklevel=1)
            print("unended", end="")
            done = nnsight.save(1)

    printed = (await service.send(printing)).printed
    assert printed[:4] == ["one 2", "a", "b", "to stderr"]
    assert any("UserWarning: careful" in line for line in printed)
    assert printed[-1] == "unended"


# ---------------------------------------------------------------- the researcher's errors


def line_of(block: Block, text: str) -> str:
    code = block.__code__
    lines = Path(code.co_filename).read_text().splitlines()
    number = next(i for i in range(code.co_firstlineno, len(lines)) if text in lines[i]) + 1
    return f'File "{code.co_filename}", line {number}'


async def test_a_traceback_points_at_the_researchers_line(service: Service) -> None:
    def failing(model: Any, **where: Any) -> None:
        def deeper(x: Any) -> Any:
            return x.no_such_thing

        with model.trace("about to fail", **where):
            hidden = model.transformer.h[0].output
            deeper(hidden)

    failed = (await service.send(failing)).failed
    assert failed.kind is FailureKind.USER
    assert line_of(failing, "deeper(hidden)") in failed.message
    assert "    deeper(hidden)\n" in failed.message
    assert "return x.no_such_thing" in failed.message
    assert failed.message.endswith(
        "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"
    )
    assert "nnsight/" not in failed.message
    assert "worker/engine" not in failed.message
    assert failed.meta["runtime_s"] > 0


async def test_asking_out_of_order_is_the_researchers_error(service: Service) -> None:
    def backwards(model: Any, **where: Any) -> None:
        with model.trace("later, then earlier", **where):
            late = model.transformer.h[1].output.save()
            early = model.transformer.h[0].output.save()

    failed = (await service.send(backwards)).failed
    assert failed.kind is FailureKind.USER
    assert "OutOfOrderError" in failed.message
    assert line_of(backwards, "early =") in failed.message


async def test_an_exit_is_told(service: Service) -> None:
    def leaving(model: Any, **where: Any) -> None:
        with model.session(**where):
            import sys

            sys.exit("enough")

    failed = (await service.send(leaving)).failed
    assert failed.kind is FailureKind.USER
    assert failed.message.endswith("SystemExit: enough")


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ({"attn_implementation": "somebody/kernel"}, "somebody/kernel"),
        ({"peft": "somebody/adapter"}, "somebody/adapter"),
        ({"device_map": "auto"}, "device_map"),
    ],
)
async def test_a_setting_outside_the_list_is_refused(
    service: Service, env: dict[str, Any], word: str
) -> None:
    from dataclasses import replace

    failed = (await service.run(replace(service.job(trace), env=env))).failed
    assert failed.kind is FailureKind.USER
    assert word in failed.message


async def test_a_blob_that_is_none(service: Service) -> None:
    from dataclasses import replace

    reply = await service.run(replace(service.job(trace), blob=b"not a blob"))
    assert reply.failed.kind is FailureKind.USER


# ---------------------------------------------------------------- sizes


def large(model: Any, **where: Any) -> None:
    with model.session(**where):
        big = torch.arange(25 * 1024 * 1024, dtype=torch.int32).save()


@pytest.mark.parametrize("compress", [True, False])
async def test_a_large_result_needs_no_more_memory_than_the_tensor(
    service: Service, compress: bool
) -> None:
    growth: list[int] = []
    job = service.job(large, compress=compress, limits=Limits(memory_bytes=140 * MIB, wall_s=60))
    outcome = await service.engine.run(job, on_written=lambda _, size: growth.append(size))
    reply = Reply(outcome=outcome, printed=[], compress=compress)
    assert reply.saved.inline is None
    assert growth == sorted(growth)
    assert growth[0] < reply.saved.size / 2
    assert reply.values["big"][-1] == 25 * 1024 * 1024 - 1


async def test_a_result_without_compression_is_plain(service: Service) -> None:
    reply = await service.send(trace, compress=False)
    assert reply.values["logits"].shape[-1] == 1024


async def test_a_large_request_comes_through(service: Service, tmp_path: Path) -> None:
    from dataclasses import replace

    weight = torch.randn(512 * 1024)

    def carrying(model: Any, **where: Any) -> None:
        with model.session(**where):
            total = weight.sum().save()

    job = service.job(carrying)
    assert isinstance(job.blob, bytes)
    assert len(job.blob) > MIB
    assert torch.equal((await service.run(job)).values["total"], weight.sum())
    file = tmp_path / "blob"
    file.write_bytes(job.blob)
    assert torch.equal((await service.run(replace(job, blob=file))).values["total"], weight.sum())


async def test_memory_that_runs_out(service: Service) -> None:
    def greedy(model: Any, **where: Any) -> None:
        with model.session(**where):
            hoard = [bytearray(16 * 1024 * 1024) for _ in range(64)]

    def greedy_tensor(model: Any, **where: Any) -> None:
        with model.session(**where):
            hoard = torch.zeros(512 * 1024 * 1024).save()

    for block in (greedy, greedy_tensor):
        failed = (await service.send(block, limits=Limits(memory_bytes=256 * MIB))).failed
        assert failed.kind is FailureKind.OOM, failed
    await still_serves(service)


# ---------------------------------------------------------------- death


async def test_a_process_that_ends_itself(walled: Service) -> None:
    def quitting(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os

            os._exit(3)

    failed = (await walled.send(quitting)).failed
    assert failed.kind is FailureKind.CRASH
    assert "status 3" in failed.message
    await still_serves(walled)


async def test_a_segmentation_fault(walled: Service) -> None:
    def crashing(model: Any, **where: Any) -> None:
        with model.session(**where):
            import ctypes

            ctypes.string_at(0)

    failed = (await walled.send(crashing)).failed
    assert failed.kind is FailureKind.CRASH
    assert "SIGSEGV" in failed.message
    await still_serves(walled)


def endless(model: Any, **where: Any) -> None:
    with model.session(**where):
        print("begun")
        while True:
            pass


async def test_time_runs_out(walled: Service) -> None:
    began = time.monotonic()
    failed = (await walled.send(endless, limits=Limits(wall_s=0.5))).failed
    assert failed.kind is FailureKind.TIMEOUT
    assert "0.5 s" in failed.message
    assert time.monotonic() - began < 2.5
    await still_serves(walled)


async def test_cancelling_ends_the_computation(walled: Service) -> None:
    begun = asyncio.Event()
    task = asyncio.create_task(walled.engine.run(walled.job(endless), lambda _: begun.set()))
    await asyncio.wait_for(begun.wait(), 30)
    running = executors(walled)
    task.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - began < 2
    assert running - executors(walled)
    await still_serves(walled)


async def test_cancelling_while_waiting_for_an_executor_costs_none(service: Service) -> None:
    jobs = [asyncio.create_task(service.engine.run(service.job(trace))) for _ in range(6)]
    await asyncio.sleep(0)
    for job in jobs[3:]:
        job.cancel()
    outcomes = await asyncio.gather(*jobs, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 3
    await still_serves(service)


async def test_nothing_is_left_behind(service: Service) -> None:
    def littering(model: Any, **where: Any) -> None:
        with model.session(**where):
            from pathlib import Path

            Path("deep/er").mkdir(parents=True)
            Path("deep/er/file").write_text("x" * 1000)
            here = nnsight.save(str(Path.cwd()))

    scratch = service.engine.spec.scratch
    folder = Path((await service.send(littering)).values["here"])
    assert folder.parent == scratch
    await wait_until_async(lambda: not folder.exists(), 5, "the executor's folder is gone")


# ---------------------------------------------------------------- the engine itself


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def executors(service: Service) -> set[int]:
    """The processes below the zygote (and below the stub that it may have for a parent)."""
    return descendants(service.engine._zygote.process.pid)


async def test_a_schedulers_warnings_end_nothing(service: Service) -> None:
    """They may reach every process of a job, and what they mean is the worker's to decide."""
    zygote = service.engine._zygote.process.pid
    before = executors(service)
    assert before
    for pid in {zygote} | before:
        for number in WARNINGS:
            os.kill(pid, number)
    assert (await service.send(trace)).values, "an executor that was warned runs it"
    assert is_alive(zygote)
    assert before & executors(service)


async def test_the_death_of_the_zygote_is_told(gpt2: Any, tiny_gpt2: Path, tmp_path: Path) -> None:
    async with serving(gpt2, tiny_gpt2, tmp_path / "engine") as service:
        begun = asyncio.Event()
        task = asyncio.create_task(service.engine.run(service.job(endless), lambda _: begun.set()))
        await asyncio.wait_for(begun.wait(), 30)
        processes = executors(service)
        service.engine._zygote.process.kill()
        failed = Reply(outcome=await asyncio.wait_for(task, 5), printed=[]).failed
        assert failed.kind is FailureKind.ENGINE
        assert "SIGKILL" in await asyncio.wait_for(service.engine.died, 5)
        assert (await service.send(trace)).failed.kind is FailureKind.ENGINE
        await wait_until_async(lambda: not any(map(is_alive, processes)), 5, "no process is left")


OWNER = """
import asyncio, pathlib, sys
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import EngineSpec, Job, Level, Limits

async def main(key, source, scratch, ceiling, blob):
    engine = Engine(EngineSpec(model_key=key, source=source, scratch=pathlib.Path(scratch),
                               floor=Level.PROCESS, ceiling=Level(ceiling)))
    await engine.start()
    job = Job(request_id="r", attempt=1, blob=pathlib.Path(blob), compress=True, limits=Limits(wall_s=60))
    await engine.run(job, lambda line: print(line, flush=True))

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("level", list(Level), ids=str)
async def test_no_process_outlives_a_killed_worker(
    service: Service, tiny_gpt2: Path, tmp_path: Path, level: Level
) -> None:
    job = service.job(endless)
    assert isinstance(job.blob, bytes)
    blob = tmp_path / "blob"
    blob.write_bytes(job.blob)
    arguments = [job.model_key, str(tiny_gpt2), str(tmp_path / "engine"), str(level), str(blob)]
    repository = Path(__file__).parents[3]
    with subprocess.Popen(  # noqa: ASYNC220 - its start is awaited below
        [sys.executable, "-c", OWNER, *arguments],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(repository)},
    ) as owner:
        assert owner.stdout is not None
        assert await asyncio.to_thread(owner.stdout.readline) == b"begun\n"
        processes = descendants(owner.pid)
        assert len(processes) >= 2
        owner.kill()
    wait_until(lambda: not any(map(is_alive, processes)), 5, "no process is left")


async def test_below_the_floor_the_engine_does_not_start(tiny_gpt2: Path, tmp_path: Path) -> None:
    engine = Engine(spec(tiny_gpt2, tmp_path / "engine", floor=Level.FULL, ceiling=Level.PROCESS))
    with pytest.raises(IsolationTooWeak, match="below the floor full"):
        await engine.start()


async def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    engine = Engine(spec(tmp_path / "empty", tmp_path / "engine"))
    with pytest.raises(EngineError, match="empty"):
        await engine.start()


async def test_a_model_that_is_too_large_is_refused_before_it_is_loaded(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    large = tmp_path / "large"
    shutil.copytree(tiny_gpt2, large)
    size = 4 * 10**12
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"transformer.wte.weight": tensor}).encode()
    with (large / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # a hole, which takes no disk
    engine = Engine(spec(large, tmp_path / "engine"))
    with pytest.raises(EngineError, match=r"too large for this allocation.* 4000\.0 GB"):
        await engine.start()


async def test_a_class_that_is_not_served(tiny_gpt2: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    key = 'os.path.PurePath:{"repo_id": "x"}'
    engine = Engine(replace(spec(tiny_gpt2, tmp_path / "engine"), model_key=key))
    with pytest.raises(EngineError, match=r"os\.path\.PurePath"):
        await engine.start()
