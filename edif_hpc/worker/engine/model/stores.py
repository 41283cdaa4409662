"""Folders of the site that executors may read: stores of data, and libraries, which are folders of Python packages.

Both are named by an operator, bound read-only into the container, and opened for reading by the walls; no executor writes
there. Libraries come last in `sys.path`: what an image has is never replaced, or requests would compute with another
torch than the one that was checked. They are added before anything heavy is imported, because libraries look at
their import for what else there is.

A store that is not there ends the engine: on a node where it is missing, each request that reads it would fail, and only there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.messages import Load


def admit(load: Load) -> None:
    """Look at the folders, and have Python find the packages of those that hold some, after all others.

    Raises:
        EngineError: a folder cannot be read here, or what is in it is not for requests to read.
    """
    for kind, folders in (("stores", load.stores), ("libraries", load.libraries)):
        for folder in folders:
            _check(kind, Path(folder), Path(load.scratch))
    sys.path.extend(load.libraries)


def _check(kind: str, folder: Path, scratch: Path) -> None:
    try:
        os.listdir(folder)  # noqa: PTH208 - asked for its error
    except OSError as error:
        raise EngineError(
            f"{folder}, one of the site's {kind} ([engine] in its file), cannot be read on this node: "
            f"{error.strerror}; mend the path, or take it out"
        ) from error
    if scratch.resolve().is_relative_to(folder.resolve()):
        raise EngineError(
            f"{folder}, one of the site's {kind} ([engine] in its file), holds the worker's own files, in {scratch}; "
            "name a folder that holds nothing but what requests may read"
        )
