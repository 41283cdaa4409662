"""The check of GPUs, whole, on the CPU by the same ways: copies and shared weights, one device and two, killed executors."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.testing.check_gpu import ask_all, bench_of, ways
from edif_hpc.testing.gpu_checks import Trial, questions, warm
from edif_hpc.testing.gpu_report import report, verified


@pytest.mark.slow
def test_all_that_is_asked_of_gpus_holds_on_the_stand_in(tmp_path: Path) -> None:
    with bench_of("cpu:0", "tiny", tmp_path, wall_s=6.0) as bench:
        assert ways(bench) == [("private", 1), ("shared", 1), ("private", 2), ("shared", 2)]
        sections = ask_all(bench, [("private", 1), ("shared", 2)])
        facts = bench.facts()
    assert [each for found in sections.values() for each in found if not each.held] == []
    page = report(facts, sections, day="2026-11-21")
    assert page.startswith("# stand-in\n")
    assert verified(page) == {"stand-in, private", "2 x stand-in, shared"}


def test_a_worker_says_which_way_it_has_weights_and_a_check_that_breaks_is_a_finding(
    tmp_path: Path,
) -> None:
    def broken(trial: Trial) -> tuple[bool, str]:
        raise ValueError("no such thing")

    with bench_of("cpu:0", "tiny", tmp_path) as bench, bench.trial("shared") as trial:
        trial.ask("warm", warm)
        trial.ask("something", broken)
        worker, name, asked = trial.worker, trial.name, [what for what, _ in questions(trial)]
        [status] = trial.stack.operator.get("/status")["deployments"].values()
    assert (status["weights"], status["unverified"]) == ("shared", True)
    assert (worker["device"], worker["weights"]) == ("cpu:0 (stand-in)", "shared")
    assert name == "stand-in, shared"
    assert "weights after two rows changed places" in asked
    first, second = trial.findings
    assert first.held, first.seen
    assert (second.held, second.seen) == (False, "ValueError: no such thing")
