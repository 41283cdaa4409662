"""The check of a GPU, as far as no process is needed: who has none is told, and the report says what did not hold."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from edif_hpc.slurm.devices import vendor_here
from edif_hpc.testing.check_gpu import NO_GPU, compute_modes, main
from edif_hpc.testing.gpu_report import Finding, report, verified
from edif_hpc.worker.engine.values import VERIFIED_GPUS

ROOT = Path(__file__).parents[3]
REPORTS = ROOT / "docs" / "reference"


@pytest.mark.skipif(vendor_here() != "none", reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == NO_GPU
    assert "no GPU here" in capsys.readouterr().err


@pytest.mark.skipif(vendor_here() != "none", reason="there is a GPU")
def test_the_script_says_so_before_it_makes_an_environment() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    done = subprocess.run(
        [ROOT / "scripts" / "check-gpu"],
        capture_output=True,
        text=True,
        env=environ,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (NO_GPU, "")
    assert "no GPU here" in done.stderr


GOOD = Finding(what="values", held=True, seen="bit for bit")
BAD = Finding(what="memory", held=False, seen="not | back")
FACTS = {"device": "NVIDIA RTX A6000", "torch": "2.13.0"}


def test_a_report_names_what_did_not_hold() -> None:
    sections = {
        "NVIDIA RTX A6000, private": [GOOD],
        "NVIDIA RTX A6000, shared": [GOOD, BAD],
        "2 x NVIDIA RTX A6000, private": [GOOD, GOOD],
    }
    page = report(FACTS, sections, day="2026-11-21")
    assert page.startswith("# NVIDIA RTX A6000\n")
    assert "found on 2026-11-21" in page
    assert "| torch | 2.13.0 |" in page
    assert "## NVIDIA RTX A6000, shared\n\n1 of 2 hold." in page
    assert "| memory | **no** | not / back |" in page
    assert verified(page) == {"NVIDIA RTX A6000, private", "2 x NVIDIA RTX A6000, private"}


def test_compute_modes_are_read_where_nvidias_tool_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_modes() == "unknown: no nvidia-smi here"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'Exclusive_Process, [N/A]'\necho 'Default, Disabled'\n")
    tool.chmod(0o700)
    assert compute_modes() == "Exclusive_Process, [N/A]; Default, Disabled"


def test_a_gpu_counts_as_verified_only_with_a_report_in_which_everything_held() -> None:
    pages = [page.read_text() for page in REPORTS.glob("gpu-*.md")]
    assert {name for page in pages for name in verified(page)} == VERIFIED_GPUS
