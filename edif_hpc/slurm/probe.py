"""A look at a compute node from inside an allocation: `python -m edif_hpc.slurm.probe ORDER`, findings out.

A login node cannot know what a compute node can do: whether it reaches the relay, sees its GPUs, starts containers, has room
and may submit. So an operator's first allocation on a cluster is a probe of two minutes, submitted as everything is, by
`submit`. It does each of these things once, for real, and writes what came of it beside its order (`probe.json`, renamed
into place, so that a reader finds all of it or nothing).

A check never raises for what it looks for: that is its finding. `grade` is OK, WARN or FAIL, and `way_out` what to do.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from edif_hpc.errors import LaunchError, SlurmUnavailable, SubmitRefused
from edif_hpc.slurm.commands import Runner, own_environ
from edif_hpc.slurm.container import Layout, exec_argv, host_environment
from edif_hpc.slurm.devices import visible_devices
from edif_hpc.slurm.finding import Finding, fail, ok, warn
from edif_hpc.slurm.mounts import IN_MEMORY, SHARED, kind_of
from edif_hpc.slurm.order import REACH, ContainerOrder, Reach, write_private
from edif_hpc.slurm.site import Gpu, Site
from edif_hpc.slurm.status import Slurm
from edif_hpc.slurm.submit import SlurmSubmitter, submission_for
from edif_hpc.slurm.ways import ways_out

_PACKAGE = "edif-hpc"
_VERSION = f"import importlib.metadata; print(importlib.metadata.version({_PACKAGE!r}))"
MODULE: Final = "edif_hpc.slurm.probe"
RESULT: Final = "probe.json"
_START_S = 60.0
_WRITTEN = 64 << 20
_LEAST_FREE = 20 << 30
_SLOW_MB_S = 100.0
_DEVICES: Mapping[str, tuple[str, ...]] = {
    "nvidia": ("nvidia[0-9]*",),
    "amd": ("kfd", "dri/renderD*"),
}


class ProbeOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe is to look at."""

    site: Site
    gpu: str
    urls: tuple[str, ...]  #: what a node has to reach: https:// and tcp://


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """All that a probe found."""

    node: str
    gpu: str
    findings: tuple[Finding, ...]
    may_submit: bool | None = None  #: None: Slurm did not say


def write_probe_order(path: Path, order: ProbeOrder) -> None:
    """Write it for its owner alone."""
    write_private(path, msgspec.json.encode(order, enc_hook=str))


def read_probed(path: Path) -> Probed | None:
    """What a probe found; None as long as it has not."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Probed)
    except FileNotFoundError:
        return None


def look_around(order: ProbeOrder, folder: Path, environ: Mapping[str, str]) -> Probed:
    """Do all checks on this node."""
    site, gpu = order.site, order.site.gpus[order.gpu]
    scratch = Path(os.path.expandvars(site.scratch))
    submits, may_submit = _submits(site, order.gpu, folder)
    findings = (
        _python(),
        *ways_out(site, order.urls),
        _gpus(gpu, environ),
        _namespaces(),
        *_scratch(scratch, site.scratch),
        *_container(site, gpu, scratch, environ),
        *_readable(site),
        _walltime(site, environ),
        submits,
    )
    return Probed(
        node=os.uname().nodename, gpu=order.gpu, findings=findings, may_submit=may_submit
    )


def _python() -> Finding:
    return ok("python", f"{platform.python_version()} at {sys.executable} on {os.uname().nodename}, kernel {platform.release()}")  # fmt: skip


# -- the node ---------------------------------------------------------------------------------------------------------------


def _gpus(gpu: Gpu, environ: Mapping[str, str]) -> Finding:
    what = "GPU"
    chosen = visible_devices(environ, gpu.vendor)
    told = ", ".join(f"{name}={value}" for name, value in chosen.items())
    if gpu.vendor == "none":
        return ok(what, told or "none is asked for")
    patterns = _DEVICES[gpu.vendor]
    there = sorted(str(path) for pattern in patterns for path in Path("/dev").glob(pattern))
    if not there:
        wanted = ", ".join(f"/dev/{each}" for each in patterns)
        return fail(what, f"no {wanted} on this node", f"its driver is missing, or it is not a node of {gpu.vendor}'s")  # fmt: skip
    mine = [path for path in there if _opens(path)]
    if not mine:
        return fail(what, f"none of {', '.join(there)} can be opened", "ask the site: groups render and video, or the cgroup of devices")  # fmt: skip
    if not chosen:
        return warn(what, f"{', '.join(mine)}; Slurm set no variable that says which are ours", "check gres.conf with the site")  # fmt: skip
    return ok(what, f"{', '.join(mine)}; {told}")


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True


def _namespaces() -> Finding:
    what = "user namespaces"
    code, said = _try(["unshare", "--user", "--map-root-user", "true"])
    if code == 0:
        return ok(what, "work")
    return warn(what, f"do not work: {said}", "apptainer needs its setuid form then, and isolation is weaker: docs/howto/read-a-level.md")  # fmt: skip


def _scratch(folder: Path, written: str) -> Iterator[Finding]:
    what = "scratch"
    if "$" in str(folder):
        yield fail(what, f"{written} names a variable that is not set here", "choose another scratch")  # fmt: skip
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        speed = _speed(folder)
    except OSError as error:
        yield fail(what, f"{folder} cannot be written: {error.strerror}", "choose another scratch")  # fmt: skip
        return
    free, kind = shutil.disk_usage(folder).free, kind_of(folder)
    seen = f"{folder}: {kind}, {free >> 30} GiB free, {speed:.0f} MB/s"
    if kind in IN_MEMORY:
        yield warn(what, seen, "it is memory, and counts as the allocation's: raise mem_gb, or choose a disk")  # fmt: skip
    elif kind in SHARED:
        yield warn(what, seen, "it is shared, not of this node: choose a local disk if there is one")  # fmt: skip
    elif free < _LEAST_FREE or speed < _SLOW_MB_S:
        yield warn(what, seen, "images and weights are copied there: choose a larger or faster disk")  # fmt: skip
    else:
        yield ok(what, seen)


def _speed(folder: Path) -> float:
    """Megabytes a second that reach the disk."""
    path, block = folder / f".edif-probe-{os.getpid()}", bytes(1 << 20)
    began = time.perf_counter()
    try:
        with path.open("wb") as file:
            for _ in range(_WRITTEN >> 20):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        return _WRITTEN / 1e6 / max(1e-6, time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def _readable(site: Site) -> Iterator[Finding]:
    """Whether what requests may read is here, and for reading only."""
    for folder in site.engine.readable:
        what = f"store {folder}"
        if not os.access(folder, os.R_OK | os.X_OK):
            yield fail(what, "cannot be read on this node", "mend its path in [engine], or put it on a file system that nodes share")  # fmt: skip
        elif site.container is None and os.access(folder, os.W_OK):
            yield warn(what, "this account may write it, and without an image a worker below level no-namespaces lets requests do so", "have another account own it")  # fmt: skip
        else:
            yield ok(what, f"{kind_of(Path(folder))}, readable")


# -- containers --------------------------------------------------------------------------------------------------------------


def _container(
    site: Site, gpu: Gpu, scratch: Path, environ: Mapping[str, str]
) -> Iterator[Finding]:
    facts = site.container
    program = facts.apptainer if facts is not None else "apptainer"
    code, said = _try([program, "--version"])
    if code != 0 and facts is None:
        yield ok("apptainer", "not here, and no image is set: workers run on the host")
        yield _level(_try([sys.executable, "-P", "-m", REACH]))
        return
    if code != 0:
        yield fail("apptainer", f"{program}: {said}", "load its module in `setup`, or give its path in [container]")  # fmt: skip
        return
    yield ok("apptainer", said)
    if facts is None:
        yield _level(_try([sys.executable, "-P", "-m", REACH]))
        return
    if not os.access(facts.image, os.R_OK):
        yield fail("image", f"{facts.image} cannot be read on this node", "put it on a file system that nodes share")  # fmt: skip
        return
    order = ContainerOrder(
        image=facts.image,
        apptainer=program,
        vendor=gpu.vendor,
        binds=facts.binds,
        env=facts.env,
    )
    inside = _Inside(order, scratch / f"edif-probe-{os.getpid()}", environ)
    try:
        code, said = inside.run("-c", _VERSION)
        yield _image(order, code, said)
        if code == 0:
            yield _level(inside.run("-P", "-m", REACH))
    except OSError as error:
        yield fail("image", f"it could not be tried: {error}", "mend the scratch first")
    finally:
        inside.end()


class _Inside:
    """The image, started as a worker is started."""

    def __init__(self, order: ContainerOrder, scratch: Path, environ: Mapping[str, str]) -> None:
        self._order, self._scratch, self._environ = order, scratch, environ

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run its Python; the exit code, and the last of what it said."""
        layout = Layout.below(self._scratch, hub_cache=None, hub_cache_writable=False)
        for folder in layout.folders:
            folder.mkdir(parents=True, exist_ok=True)
        for file in (layout.order, layout.env_file):
            write_private(file, b"")
        command = [self._order.python, *arguments]
        argv = exec_argv(self._order, layout, image=Path(self._order.image), command=command)
        return _try(argv, host_environment(layout, self._environ))

    def end(self) -> None:
        """Leave nothing."""
        shutil.rmtree(self._scratch, ignore_errors=True)


def _level(answer: tuple[int, str]) -> Finding:
    """Which level of isolation a worker would reach here, and what stands in the way of a better one."""
    what, (code, said) = "isolation", answer
    try:
        found = msgspec.json.decode(said, type=Reach)
    except msgspec.MsgspecError:
        return fail(what, f"it could not be tried (exit code {code}): {said}", "mend what is said above first")  # fmt: skip
    if not found.missing:
        return ok(what, f"a worker here reaches level {found.level}")
    lacking = "; ".join(found.missing)
    return warn(what, f"a worker here reaches only level {found.level} ({lacking})", "what to ask the site for: docs/howto/read-a-level.md")  # fmt: skip


def _image(order: ContainerOrder, code: int, said: str) -> Finding:
    """Whether its Python could tell which edif-hpc it has."""
    what, own = "image", _own_version()
    if code != 0:
        return fail(what, f"{order.image}: {said}", "these are apptainer's own words; see docs/howto/images.md")  # fmt: skip
    if own is not None and said != own:
        return warn(what, f"{order.image} has {_PACKAGE} {said}, and its pilot {own}", "build the image anew")  # fmt: skip
    return ok(what, f"{order.image} starts, with {_PACKAGE} {said}")


def _own_version() -> str | None:
    try:
        return importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:  # it runs from its sources
        return None


def _try(argv: list[str], environ: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run it; its exit code, and the last of what it said."""
    try:
        answer = Runner(environ=environ)(argv, timeout_s=_START_S)
    except OSError as error:
        return 127, error.strerror or str(error)
    lines = (answer.out.strip() or answer.err.strip()).splitlines()
    return answer.code, lines[-1] if lines else f"exit code {answer.code}"


# -- the scheduler, seen from here -------------------------------------------------------------------------------------------


def _walltime(site: Site, environ: Mapping[str, str]) -> Finding:
    what, job = "end of the walltime", environ.get("SLURM_JOB_ID", "")
    if environ.get("SLURM_JOB_END_TIME"):
        return ok(what, "told by SLURM_JOB_END_TIME")
    try:
        left_s = Slurm(site).left_s(job) if job else None
    except SlurmUnavailable as error:
        return warn(what, str(error), "the end is counted from the start instead")
    if left_s is None:
        return warn(what, "Slurm does not tell it here", "the end is counted from the start instead")  # fmt: skip
    return ok(what, f"told by scontrol: {left_s:.0f} s are left")


def _submits(site: Site, gpu: str, folder: Path) -> tuple[Finding, bool | None]:
    """Whether a successor could be submitted from here; asked of sbatch itself, which only pretends."""
    what = "sbatch from here"
    never = (
        "set compute_may_submit = false: a launcher on a login node submits, and has to run always"
    )
    submission = submission_for(
        site,
        gpu=gpu,
        gpus=1,
        walltime_min=1,
        name=folder.name,
        order=folder / "probe.order",
        folder=folder / "again",
    )
    try:
        return ok(what, SlurmSubmitter(site).test_only(submission)), True
    except SubmitRefused as error:
        may = None if error.kind != "config" else False
        return warn(what, str(error), never if may is False else "probe again later"), may
    except LaunchError as error:
        return warn(what, str(error), "probe again later"), None


def _main(argv: list[str]) -> None:
    path = Path(argv[1])
    order = msgspec.json.decode(
        path.read_bytes(), type=ProbeOrder, dec_hook=lambda kind, text: kind(text)
    )
    found = look_around(order, path.parent, own_environ())
    temporary = path.parent / f".{RESULT}"
    write_private(temporary, msgspec.json.encode(found))
    temporary.rename(path.parent / RESULT)


if __name__ == "__main__":
    _main(sys.argv)
