"""The check of a GPU, as far as no process is needed: who has none is told, and the report says what did not hold."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from edif_hpc.slurm.devices import vendor_here
from edif_hpc.testing.check_gpu import NO_GPU, Finding, main, report
from edif_hpc.worker.engine.values import VERIFIED_GPUS

ROOT = Path(__file__).parents[3]
REPORTS = ROOT / "docs" / "reference"


def verified(reports: Path) -> set[str]:
    """The GPUs with a report in which everything held."""
    found = set()
    for page in reports.glob("gpu-*.md"):
        text = page.read_text()
        told = re.search(r"(\d+) of (\d+) hold", text)
        if told and told[1] == told[2]:
            found.add(text.splitlines()[0].removeprefix("# "))
    return found


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


def test_a_report_names_what_did_not_hold(tmp_path: Path) -> None:
    good = Finding(what="values", held=True, seen="bit for bit")
    bad = Finding(what="memory", held=False, seen="not | back")
    facts = {"device": "NVIDIA RTX A6000", "torch": "2.13.0"}
    page = report(facts, [good, bad])
    assert page.startswith("# NVIDIA RTX A6000\n")
    assert "1 of 2 hold" in page
    assert "| memory | **no** | not / back |" in page
    (tmp_path / "gpu-a6000.md").write_text(page)
    assert verified(tmp_path) == set()
    (tmp_path / "gpu-a6000.md").write_text(report(facts, [good]))
    assert verified(tmp_path) == {"NVIDIA RTX A6000"}


def test_a_gpu_counts_as_verified_only_with_a_report_in_which_everything_held() -> None:
    assert verified(REPORTS) == VERIFIED_GPUS
