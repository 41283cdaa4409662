"""Starting a pilot as a scheduler does: with an order in a folder, a log, and perhaps as another user.

Tests often run as root, which is the one user that no cluster's pilot is, and for whom many a wall does not stand. So a
pilot, and with it the worker and all that it starts, may run as an ordinary user: everything in the allocation's folder is
given to that user first.
"""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path


def start_pilot(
    folder: Path, environ: Mapping[str, str], user: str | None
) -> subprocess.Popen[bytes]:
    """Start the pilot of the order in `folder`, as `user` or as ourselves."""
    command = [sys.executable, "-u", "-m", "edif_hpc.pilot.app", str(folder / "order")]
    environ = dict(environ)
    if user is not None:
        environ |= {"HOME": str(folder), "USER": user}
        give(folder, user)
        give(folder / "order", user)
    with (folder / "pilot.log").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environ,
            cwd=folder,
            start_new_session=True,
            user=user,
            group=None if user is None else pwd.getpwnam(user).pw_gid,
            extra_groups=None if user is None else [],
        )


def give(path: Path, user: str) -> None:
    """Make a file or folder, but not what lies in it, that of a user."""
    facts = pwd.getpwnam(user)
    os.chown(path, facts.pw_uid, facts.pw_gid)
