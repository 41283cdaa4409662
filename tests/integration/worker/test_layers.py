"""Every layer of the walls is needed: without it an attempt that it stops comes out otherwise."""

from __future__ import annotations

import os
import runpy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.testing.attacks import runner
from edif_hpc.testing.attacks.expected import CASES, GUARDS, Case
from edif_hpc.testing.attacks.ground import Ground
from edif_hpc.testing.leaky_zygote import launching
from edif_hpc.testing.processes import processes_of
from edif_hpc.worker.engine.launch import Launch, launched
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import Failed, Level, Limits
from tests.integration.worker.conftest import Service, spec

MIB = 1 << 20
LIMITS = {
    "usual": Limits(wall_s=60),
    "small": Limits(wall_s=60, memory_bytes=192 * MIB, scratch_bytes=64 * MIB),
}
BY_NAME = {case.name: case for case in CASES}
SHARED_STEPS = {"namespaces", "watch"}


@asynccontextmanager
async def behind(
    model: Any, source: Path, scratch: Path, launch: Launch
) -> AsyncIterator[Service]:
    """An engine at the full level, started in this way."""
    engine = Engine(spec(source, scratch, ready=1), launch)
    info = await engine.start()
    try:
        if info.isolation.level is not Level.FULL:
            absent(f"not to be had here: {info.isolation.missing}")
        yield Service(engine=engine, info=info, model=model)
    finally:
        await engine.stop()


def zygote(service: Service) -> int:
    """The process that forks, under the stub that the worker started."""
    stub = service.engine._zygote.process.pid
    return min(
        each.pid for each in processes_of(service.engine.spec.scratch) if each.parent == stub
    )


async def outcome(service: Service, case: Case, source: Path, folder: Path) -> str:
    """What becomes of a case in an engine."""
    with Ground(root=folder / "ground") as ground:
        weights = source / "model.safetensors"
        scratch = service.engine.spec.scratch
        facts = ground.facts(
            worker=os.getpid(), zygote=zygote(service), scratch=scratch, weights=weights
        )
        cell = folder / "cell.py"
        cell.write_text(runner.source(case, facts | {"patience": 1.0}))
        block = runpy.run_path(str(cell))["block"]
        reply = await service.send(block, limits=LIMITS[case.limits])
        if isinstance(reply.outcome, Failed):
            told = runner.Told(kind=str(reply.failed.kind), text=reply.failed.message)
        else:
            told = runner.Told(**reply.values["told"])
        return runner.outcome(told, ground.left("/dev/shm"), returned=case.returned)


async def test_the_cases_come_out_as_expected_with_all_layers(
    gpt2: Any, tiny_gpt2: Path, tmp_path: Path
) -> None:
    async with behind(gpt2, tiny_gpt2, tmp_path / "engine", launched) as service:
        assert set(service.info.isolation.steps) <= set(GUARDS), "a layer that no case guards"
        assert set(GUARDS) == {*service.info.isolation.steps, *SHARED_STEPS}
        for number, name in enumerate(sorted(set(GUARDS.values()))):
            folder = tmp_path / str(number)
            folder.mkdir()
            found = await outcome(service, BY_NAME[name], tiny_gpt2, folder)
            assert found in BY_NAME[name].outcomes[Level.FULL], name


@pytest.mark.parametrize("layer", GUARDS)
async def test_without_a_layer_its_case_turns_red(
    gpt2: Any, tiny_gpt2: Path, tmp_path: Path, layer: str
) -> None:
    case = BY_NAME[GUARDS[layer]]
    launch = launching(frozenset({layer}))
    async with behind(gpt2, tiny_gpt2, tmp_path / "engine", launch) as service:
        found = await outcome(service, case, tiny_gpt2, tmp_path)
        assert found not in case.outcomes[Level.FULL]
