"""The parts that tests fetch from outside: Debian's packages by apt, Python's files by pip.

Tests run against real programs: Slurm, Ceph, Apptainer, strace. They come as Debian packages and are installed when the
first test asks for them, so that a bare machine can run every test. That takes root and apt; elsewhere whoever runs the
tests installs the programs in his own way, and they are taken from PATH wherever they come from.

What cannot be had is one error, `PartMissing`, and what that means is the test's to say (`edif_hpc.testing.absent`).

    install_packages("strace", programs=["strace"])
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from edif_hpc.errors import LaunchError

_APT = ("apt-get", "-qq", "-oDPkg::Lock::Timeout=300")
_INSTALL_S = 600.0


class PartMissing(LaunchError):
    """A part that a test needs is not on this machine, and cannot be fetched by this user."""


def install_packages(*packages: str, programs: Sequence[str] = ()) -> None:
    """Have Debian's `packages`; none is missing where all of `programs`, which they bring, are on PATH.

    Raises:
        PartMissing: they would have to be installed, and cannot be.
    """
    missing = [name for name in programs if shutil.which(name) is None]
    if not missing if programs else _all_installed(packages):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PartMissing(
            f"needs {', '.join(missing or packages)}; as root on Debian or Ubuntu: "
            f"apt-get install --no-install-recommends {' '.join(packages)}"
        )
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        with _one_at_a_time():
            run([*_APT, "update"], env=quiet, timeout_s=_INSTALL_S)
            install = [*_APT, "install", "-y", "--no-install-recommends", *packages]
            run(install, env=quiet, timeout_s=_INSTALL_S)
    except LaunchError as error:
        raise PartMissing(str(error)) from error


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Keep other tests of this environment away from apt, whose `update` does not wait for the lock on its lists."""
    with (Path(sys.prefix) / "apt.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(*arguments: str, folder: Path, timeout_s: float = _INSTALL_S) -> None:
    """Download what pip's `arguments` name into `folder`, without what it depends on.

    Raises:
        PartMissing: the index that pip is set up for does not have it, or cannot be reached.
    """
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder)]
    try:
        run([*pip, *arguments], timeout_s=timeout_s)
    except LaunchError as error:
        raise PartMissing(str(error)) from error


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
    cwd: Path | None = None,
) -> str:
    """Run a command and return what it says.

    Raises:
        LaunchError: it failed, or has not ended within `timeout_s`; the message ends with its words.
    """
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise LaunchError(f"{shown} has not ended within {timeout_s:g} s") from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise LaunchError(f"{shown} ended with {done.returncode}: {said}")
    return done.stdout


def _all_installed(packages: Sequence[str]) -> bool:
    if shutil.which("dpkg-query") is None:
        return False
    shown = ["dpkg-query", "-W", "-f=${db:Status-Status}\n", *packages]
    states = subprocess.run(shown, capture_output=True, text=True, check=False)
    return states.stdout.split() == ["installed"] * len(packages)
