"""A launcher for tests: `python -m edif_hpc.testing.launcher SITE_FILE NAME INTERVAL_S`; relay and token as for the command line.

It is `edif-hpc launcher run`, but for three things. It has a name of its own and takes no lock, so two of them stand for two login
nodes. The pilots that it submits run the worker without a model (`noop_worker`). And `EDIF_LAUNCHER_FAILPOINTS` says where it dies.
"""

from __future__ import annotations

import functools
import os
import sys
from pathlib import Path
from typing import Final

from edif_hpc.cli.api import Api
from edif_hpc.failpoints import Failpoints
from edif_hpc.launcher.daemon import serve
from edif_hpc.launcher.runtime import Launcher
from edif_hpc.settings import load_client
from edif_hpc.slurm.site import load_site
from edif_hpc.slurm.status import Slurm
from edif_hpc.slurm.submit import SlurmSubmitter

NOOP: Final = "edif_hpc.testing.noop_worker"


def main(argv: list[str]) -> int:
    """Run one launcher until it is told to end."""
    file, name, interval_s = argv[1:]
    site = load_site(Path(file))
    launcher = Launcher(
        site=site,
        name=name,
        relay=Api(load_client(flags={}, environ=os.environ)),
        scheduler=Slurm(site),
        submitter=SlurmSubmitter(site),
        failpoints=Failpoints.parse(os.environ.get("EDIF_LAUNCHER_FAILPOINTS", "")),
        worker_module=NOOP,
        site_file=Path(file),
    )
    serve(launcher, interval_s=float(interval_s), tell=functools.partial(print, flush=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
