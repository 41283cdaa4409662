"""A short run of `scripts/bench chaos`: twenty kills over all kinds of process, with the real engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from edif_hpc.testing.bench.chaos import run

pytestmark = pytest.mark.slow

KILLS = {"relay": 8, "executor": 8, "worker": 2, "pilot": 2}


def test_nothing_is_lost_and_nothing_doubled(tmp_path: Path, tiny_gpt2: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    report = run(tmp_path / "stack", model=tiny_gpt2, kills=KILLS, seed=seed, pause_s=0.5)
    assert report.ok, "\n".join(report.lines())
    assert report.kills == KILLS
