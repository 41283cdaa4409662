"""Which level of isolation a worker would reach on this machine: `python -m edif_hpc.worker.reach`.

The probe of a compute node starts it where workers start, in their image if there is one, because a level depends on both: on the
node's kernel and on what the container leaves of it. It prints one line of JSON, and needs neither torch nor nnsight.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import msgspec

from edif_hpc.errors import EdifError
from edif_hpc.slurm.order import Reach
from edif_hpc.worker.engine.values import Level
from edif_hpc.worker.engine.walls.probing import probe


def reached() -> Reach:
    """Find out, by trying."""
    with tempfile.TemporaryDirectory(prefix="edif-reach-") as scratch:
        layers, missing = probe(Path(scratch), ceiling=Level.FULL, floor=Level.PROCESS)
    return Reach(level=str(layers.level), missing=missing)


def main() -> int:
    """Print what was found; the exit code is 1 if workers cannot run here at all."""
    try:
        found = reached()
    except (EdifError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
