"""The checks of `edif-hpc site check`: a site's file against what its cluster says, and against what sbatch would take.

The cluster's own description is compared first, because its words name what is there; then each kind of GPU is submitted with
`sbatch --test-only`, with its longest walltime, through the very code that will submit it. The scheduler's words are shown as
they are, with advice for those that are known.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from edif_hpc.errors import (
    EdifError,
    LaunchError,
    SlurmUnavailable,
    SubmitRefused,
    SubmitUnknown,
)
from edif_hpc.slurm.commands import Run
from edif_hpc.slurm.detect import Cluster, detect
from edif_hpc.slurm.finding import Finding, fail, ok, warn
from edif_hpc.slurm.mounts import IN_MEMORY, kind_of
from edif_hpc.slurm.order import read_forward
from edif_hpc.slurm.site import Gpu, Site
from edif_hpc.slurm.submit import SlurmSubmitter, check_folder, submission_for

_LOCAL = IN_MEMORY | {"ext2", "ext3", "ext4", "xfs", "btrfs", "overlay"}
_ADVICE: tuple[tuple[str, str], ...] = (
    ("invalid account|account.*not (allowed|permitted)|accountnotallowed", "set `account` to one of yours: sacctmgr show assoc user=$USER format=Account"),
    ("invalid qos|qosnotallowed", "set `qos` to one of yours: sacctmgr show assoc user=$USER format=QOS"),
    ("invalid partition|partition.*(inactive|unavailable)", "set `partition` to one of `sinfo -o %R`"),
    ("not permitted to use this partition|group.*not permitted", "your group may not use this partition: ask the site, or remove this table"),
    ("generic resource|gres", "set `gres` as `sinfo -o %G` shows it, without a number"),
    ("node configuration is not available|more processors|memory (specification|required)", "no node has that much: lower `cpus` or `mem_gb`, or correct `gres`"),
    ("time limit|maxwall", "lower `max_walltime_min`, or choose a QOS that allows it"),
    ("reservation", "set `reservation` to one of `scontrol show reservation`"),
    ("feature|constraint", "set `constraint` to one of `sinfo -o %f`"),
    ("unrecognized option", "an option in `options` is unknown to this Slurm"),
    ("accounting/qos policy|limit", "a limit of the account or QOS is reached now; it may pass, or ask the site for a higher one"),
    ("contact slurm controller|socket timed out", "the controller is away: try again"),
)  # fmt: skip


def advice(words: str) -> str:
    """What to do about what sbatch said."""
    plain = words.lower()
    known = (way for pattern, way in _ADVICE if re.search(pattern, plain))
    return next(known, "these are the scheduler's own words; ask the site what they mean")


def examine_site(site: Site, *, run: Run | None = None) -> Iterator[Finding]:
    """All checks that need no allocation."""
    if site.scheduler == "local":
        yield ok("scheduler", "local: allocations are processes of this machine")
        yield _state_dir(site.state_dir, shared=False)
        return
    folder = _state_dir(site.state_dir, shared=True)
    yield folder
    if site.container is not None:
        yield _image(site.container.image)
    if site.route == "login" and not site.proxy:
        yield _forwarder(site)
    try:
        cluster = detect(run)
    except SlurmUnavailable as error:
        yield fail("slurm", str(error), "run this on a login node of the cluster")
        return
    yield ok("slurm", f"{cluster.name}, {cluster.version}")
    for name, gpu in site.gpus.items():
        yield _against(cluster, f"{name}: partition", gpu)
        if folder.grade != "FAIL":
            yield dry_run(site, name, run=run)


def dry_run(site: Site, gpu: str, *, run: Run | None = None) -> Finding:
    """Have sbatch say whether it would take the longest allocation of this kind."""
    what = f"{gpu}: sbatch --test-only"
    try:
        return ok(what, _pretend(site, gpu, 1, site.gpus[gpu].max_walltime_min, run))
    except SubmitRefused as error:
        grade = fail if error.kind == "config" else warn
        return grade(what, str(error), advice(str(error)))
    except LaunchError as error:
        return warn(what, str(error), advice(str(error)))


def must_be_taken(
    site: Site, gpu: str, *, gpus: int, walltime_min: int, run: Run | None = None
) -> None:
    """Do nothing if sbatch would take such an allocation, or cannot say now.

    Raises:
        SubmitRefused: it never would, as it was asked for.
    """
    with suppress(SubmitUnknown):
        try:
            _pretend(site, gpu, gpus, walltime_min, run)
        except SubmitRefused as error:
            if error.kind == "config":
                raise SubmitRefused(f"nothing was asked for: {error}; {advice(str(error))}", kind="config") from error  # fmt: skip


def _pretend(site: Site, gpu: str, gpus: int, walltime_min: int, run: Run | None) -> str:
    """What `sbatch --test-only` says."""
    name = f"edif-check-{gpu}-{secrets.token_hex(4)}"
    folder = site.state_dir / name
    submission = submission_for(
        site,
        gpu=gpu,
        gpus=gpus,
        walltime_min=walltime_min,
        name=name,
        order=folder / "order",
        folder=folder,
    )
    try:
        check_folder(site.state_dir)
        return SlurmSubmitter(site, run=run).test_only(submission)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _against(cluster: Cluster, what: str, gpu: Gpu) -> Finding:
    """A table against what the cluster says of its partition."""
    partition = cluster.partitions.get(gpu.partition)
    if partition is None:
        there = ", ".join(cluster.partitions) or "none"
        return fail(
            what, f"there is no {gpu.partition}; there are: {there}", "correct `partition`"
        )
    if not partition.up:
        return fail(what, f"{gpu.partition} is down", "wait, or choose another partition")
    kinds = [each.gres for each in cluster.kinds(gpu.partition)]
    if gpu.gres not in kinds and gpu.gres != "gpu":
        return fail(what, f"{gpu.partition} has no {gpu.gres}; it has: {', '.join(kinds) or 'no GPUs'}", "correct `gres`")  # fmt: skip
    limit = partition.max_walltime_min
    if limit is not None and gpu.max_walltime_min > limit:
        return fail(what, f"max_walltime_min is {gpu.max_walltime_min}, and {gpu.partition} allows {limit}", f"set it to {limit}: longer jobs would wait for ever")  # fmt: skip
    return ok(what, f"{gpu.partition} has {gpu.gres}, and allows {limit or 'any number of'} min")


def _state_dir(folder: Path, *, shared: bool) -> Finding:
    what = "state_dir"
    try:
        check_folder(folder)
    except (LaunchError, OSError) as error:
        return fail(what, str(error), "choose another folder")
    kind = kind_of(folder)
    if shared and kind in _LOCAL:
        return warn(what, f"{folder} is on {kind}, which looks like this machine's own disk", "compute nodes must see it too; --probe finds out")  # fmt: skip
    return ok(what, f"{folder} ({kind})")


def _forwarder(site: Site) -> Finding:
    what = "route login"
    try:
        return ok(what, f"a forwarder was started at {read_forward(site.forward_file).address}")
    except (EdifError, OSError, msgspec.DecodeError) as error:
        way_out = f"start it: edif-hpc launcher run --site {site.name} --forward"
        return fail(what, f"no forwarder is known: {error}", way_out)


def _image(path: str) -> Finding:
    if os.access(path, os.R_OK):
        return ok("image", path)
    return fail("image", f"{path} cannot be read here", "build it: scripts/build-image; or correct `image`")  # fmt: skip
