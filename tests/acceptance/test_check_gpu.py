"""The check of a GPU, whole, on the CPU by the same way: private copies, one executor at a time, killed ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.testing.check_gpu import CHECKS, Trial, report, trial_of


@pytest.mark.slow
def test_all_that_is_asked_of_a_gpu_holds_on_the_stand_in(tmp_path: Path) -> None:
    with trial_of("cpu:0", "tiny", tmp_path) as trial:
        for what, check in CHECKS:
            trial.ask(what, check)
        worker = trial.worker
        [status] = trial.stack.operator.get("/status")["deployments"].values()
    assert status["unverified"]
    assert [each for each in trial.findings if not each.held] == []
    assert len(trial.findings) == len(CHECKS)
    assert (worker["device"], worker["unverified"]) == ("cpu:0 (stand-in)", True)


def test_a_check_that_breaks_is_a_finding(tmp_path: Path) -> None:
    def broken(trial: Trial) -> tuple[bool, str]:
        raise ValueError("no such thing")

    with trial_of("cpu:0", "tiny", tmp_path) as trial:
        trial.ask("something", broken)
    [finding] = trial.findings
    assert not finding.held
    assert "ValueError: no such thing" in report({"device": "stand-in"}, trial.findings)
