"""The checks of `edif-hpc doctor`: each looks at one thing and says what it found and the way out.

A check never raises for what it looks for: that is its finding. The relay is asked once for each question; if it does not
answer at all, the questions to it are left out, because one broken thing should be one line.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from email.utils import parsedate_to_datetime
from pathlib import Path

from edif_hpc.cli.api import Api
from edif_hpc.cli.context import Context
from edif_hpc.cli.show import size
from edif_hpc.clock import SystemClock
from edif_hpc.errors import EdifError, SettingsError
from edif_hpc.slurm.finding import Finding, Grade, fail, ok, warn

MAX_CLOCK_DIFFERENCE_S = 30.0
LOW_DISK_BYTES = 5 << 30
NO_DISK_BYTES = 256 << 20
PACKAGE = "edif-hpc"

_REQUIREMENT = re.compile(r"([A-Za-z0-9_.-]+)[^;]*(?:;.*extra == ['\"]([a-z0-9-]+)['\"])?")


def examine(ctx: Context) -> Iterator[Finding]:
    """All checks, one after the other."""
    yield _python()
    yield from _libraries()
    yield _settings_file(ctx.config_file)
    yield from _relay(ctx)
    yield from _data_dir(ctx)
    yield _isolation()
    yield from _sites(ctx)


def _python() -> Finding:
    return ok(
        "python", f"{platform.python_version()} at {sys.executable}, kernel {platform.release()}"
    )


def _libraries() -> Iterator[Finding]:
    """The core must be complete; of an extra, all or nothing."""
    try:
        stated = importlib.metadata.requires(PACKAGE) or []
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield warn(PACKAGE, "not installed, runs from its sources", "pip install -e .")
        return
    groups: dict[str, list[str]] = {}
    for match in filter(None, map(_REQUIREMENT.match, stated)):
        groups.setdefault(match[2] or "", []).append(match[1])
    yield _group(f"{PACKAGE} {version}", groups.pop("", []), needed=True)
    for extra in ("relay", "s3", "worker", "adapters", "client"):
        yield _group(f"extra [{extra}]", groups.get(extra, []), needed=False)


def _group(what: str, names: list[str], *, needed: bool) -> Finding:
    versions = {name: _version(name) for name in names}
    absent = [name for name, version in versions.items() if version is None]
    if not absent:
        return ok(what, ", ".join(f"{name} {version}" for name, version in versions.items()))
    if needed:
        return fail(what, f"{', '.join(absent)} missing", f"pip install {PACKAGE}")
    if len(absent) == len(names):
        return ok(what, "not installed")
    return warn(
        what,
        f"{', '.join(absent)} missing",
        f"pip install '{PACKAGE}{what.removeprefix('extra ')}'",
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _settings_file(file: Path) -> Finding:
    what = "settings file"
    try:
        mode = file.stat().st_mode & 0o777
    except FileNotFoundError:
        return ok(what, f"{file} does not exist; defaults and the environment count")
    except OSError as error:
        return fail(what, f"{file}: {error.strerror}", f"look at its permissions: ls -l {file}")
    if mode & 0o077:
        return fail(
            what,
            f"{file} can be read by others ({mode:04o}), and may hold a token",
            f"chmod 600 {file}",
        )
    return ok(what, str(file))


def _relay(ctx: Context) -> Iterator[Finding]:
    try:
        api = ctx.api()
    except SettingsError as error:
        yield fail("settings", str(error), "mend that setting")
        return
    try:
        before = SystemClock().wall()
        response = api.open("/ping", signed=True)
    except EdifError as error:
        yield fail("relay", str(error), "nothing else can be asked of it")
        return
    took = SystemClock().wall() - before
    yield ok("relay", f"{api.url} answers in {took * 1000:.0f} ms")
    yield _same_version(response.headers.get("edif-version"))
    yield _clock(response.headers.get("date"), before + took / 2)
    yield _token(api)
    yield from _deployments(api)


def _same_version(told: str | None) -> Finding:
    what, own = "relay's version", _version(PACKAGE) or "unknown"
    if told is None:
        way_out = "it is older than this edif-hpc, or does not know your token, or something between strips the header"
        return warn(what, f"not told; this is {own}", way_out)
    if told != own:
        return warn(what, f"{told}, and this is {own}", f"pip install {PACKAGE}=={told}")
    return ok(what, f"{told}, as this one")


def _clock(date: str | None, now: float) -> Finding:
    if date is None:
        return warn("clock", "the relay's answer has no date, so clocks cannot be compared")
    difference = abs(parsedate_to_datetime(date).timestamp() - now)
    if difference > MAX_CLOCK_DIFFERENCE_S:
        return warn(
            "clock",
            f"differs from the relay's by {difference:.0f} s",
            "set the time by NTP; links expire by it",
        )
    return ok("clock", f"within {max(1.0, difference):.0f} s of the relay's")


def _token(api: Api) -> Finding:
    try:
        found = api.get("/whoami")
    except EdifError as error:
        return fail("token", str(error), "an operator makes one: edif-hpc token create NAME")
    return ok("token", f"{found['email']}, {', '.join(found['tags'])}")


def _deployments(api: Api) -> Iterator[Finding]:
    served = api.open("/status").json()["deployments"]
    if not served:
        yield warn("deployments", "there are none", "edif-hpc deployment add ORG/MODEL")
    for name, each in served.items():
        what = f"deployment {name}"
        if each["application_state"] == "RUNNING":
            yield ok(
                what, f"{each['repo_id']} is warm, isolation {each.get('isolation') or 'unknown'}"
            )
        elif each["application_state"] == "NOT_STARTED":
            yield warn(what, f"{each['repo_id']} has no worker", f"edif-hpc up {name}")
        else:
            yield warn(
                what, f"{each['repo_id']} is not warm: {each.get('why', 'loading')}", "edif-hpc ps"
            )


def _data_dir(ctx: Context) -> Iterator[Finding]:
    """The relay's folder, where the relay is on this machine."""
    try:
        folder = ctx.relay_settings({}).data_dir
    except SettingsError as error:
        yield fail("relay settings", str(error), "mend that setting")
        return
    if not (folder / "queue.sqlite").exists():
        return
    if folder.stat().st_mode & 0o077:
        yield fail("data directory", f"{folder} can be read by others", f"chmod 700 {folder}")
    free = shutil.disk_usage(folder).free
    seen = f"{folder} has {size(free)} free"
    if free < NO_DISK_BYTES:
        yield fail("disk", seen, "free some: requests cannot be accepted on a full disk")
    elif free < LOW_DISK_BYTES:
        yield warn(
            "disk", seen, "results are kept for relay.result_retention_s; lower it, or add space"
        )
    else:
        yield ok("disk", seen)


def _isolation() -> Finding:
    """How strongly a worker on this machine could wall in what it runs, found by trying."""
    from edif_hpc.worker.engine.values import Level
    from edif_hpc.worker.engine.walls.probing import probe

    what = "isolation"
    try:
        with tempfile.TemporaryDirectory(prefix="edif-doctor-") as scratch:
            layers, missing = probe(Path(scratch), ceiling=Level.FULL, floor=Level.PROCESS)
    except (EdifError, OSError) as error:
        return fail(what, str(error), "workers cannot run on this machine")
    if layers.level is Level.FULL:
        return ok(what, f"a worker here would reach level {layers.level}")
    return warn(
        what, f"a worker here would reach only level {layers.level} ({'; '.join(missing)})",
        "what the kernel has to offer: docs/howto/read-a-level.md",
    )  # fmt: skip


def _sites(ctx: Context) -> Iterator[Finding]:
    """The sites that have a file here, in brief: what is not in order, or one line if all is."""
    from edif_hpc.cli.site import site_files
    from edif_hpc.cli.sites.checks import examine_site
    from edif_hpc.slurm.site import load_site

    for path in site_files(ctx):
        what = f"site {path.stem}"
        try:
            site = load_site(path)
        except SettingsError as error:
            yield fail(what, str(error), "mend that file")
            continue
        if site.scheduler == "slurm" and shutil.which("sbatch") is None:
            yield warn(
                what, "not checked: there is no sbatch here", "run doctor on its login node"
            )
            continue
        found = list(examine_site(site))
        bad = [each for each in found if each.grade is not Grade.OK]
        yield from (replace(each, what=f"{what}, {each.what}") for each in bad)
        if not bad:
            yield ok(
                what, f"{len(found)} checks; the nodes: edif-hpc site check {path.stem} --probe"
            )
