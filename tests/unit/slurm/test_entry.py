"""What a scheduler runs becomes the pilot of the right order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.slurm.entry import ORDER

ENTER = "from edif_hpc.slurm.entry import enter; enter('pickled', 'shows_its_order')"


@pytest.mark.parametrize("told", [{}, {ORDER: "told"}])
def test_the_batch_script_says_which_order_is_meant(tmp_path: Path, told: dict[str, str]) -> None:
    """The pickle may be another submission's."""
    (tmp_path / "shows_its_order.py").write_text("import sys; print(sys.argv[1])")
    paths = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ran = subprocess.run(
        [sys.executable, "-c", ENTER],
        env={**os.environ, **told, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert ran.stdout.strip() == told.get(ORDER, "pickled")
