"""Which place is meant: this machine, a cluster with a file here, or one that only the relay knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.allocations.local import SITE, LocalSite
from edif_hpc.cli.allocations.targets import Line, must_be_deployed, processes
from edif_hpc.cli.allocations.up_at_site import raise_at, raise_from_afar
from edif_hpc.cli.allocations.up_here import bring_up, local_folder, local_site
from edif_hpc.cli.context import Context
from edif_hpc.cli.site import find_site, site_files
from edif_hpc.errors import NotFound, SettingsError
from edif_hpc.slurm.logs import log_of
from edif_hpc.slurm.ordering import folder_of
from edif_hpc.slurm.site import Site, load_site

_OF_CLUSTERS = ("gpu", "gpus")


def place(
    ctx: Context,
    target: str,
    where: str,
    options: Mapping[str, Any],
    *,
    wait: bool,
    timeout_s: float | None,
) -> str:
    """Bring a deployment up where it is wanted; returns its name."""
    if where == SITE:
        return _here(
            ctx, target, local_site(ctx, options), options, wait=wait, timeout_s=timeout_s
        )
    try:
        site = find_site(ctx, where)
    except SettingsError:
        if where not in ctx.api().get("/api/launchers")["launchers"]:
            raise
        return raise_from_afar(ctx, target, where, options, wait=wait, timeout_s=timeout_s)
    if site.scheduler == SITE:
        at = LocalSite(folder=site.state_dir, engine=site.engine)
        return _here(ctx, target, at, options, wait=wait, timeout_s=timeout_s)
    return raise_at(ctx, target, where, options, wait=wait, timeout_s=timeout_s)


def rescale(ctx: Context, target: str, replicas: int) -> dict[str, Any]:
    """Change the number of replicas; on this machine new ones are started here."""
    api = ctx.api()
    known = must_be_deployed(api, target)
    name = str(known["name"])
    before = processes(api, name)
    api.post(f"/api/deployments/{name}/replicas", {"replicas": replicas})
    if replicas > known["replicas"] and any(line["site"] == SITE for line in before):
        bring_up(ctx, name, local_site(ctx, {}), {}, wait=False, timeout_s=None)
    return {"deployment": name, "replicas": replicas, "before": known["replicas"]}


def replace(ctx: Context, target: str | None, node: str | None) -> list[str]:
    """Drain allocations one by one, so that their slots are filled again; returns their names.

    Raises:
        NotFound: there is no such allocation, deployment or node.
    """
    api = ctx.api()
    lines = processes(api)
    mine = [line for line in lines if _meant(line, target, node)]
    if not mine and target is not None:
        must_be_deployed(api, target)
    if not mine:
        there = sorted({str(line["node"] or line["name"]) if node else str(line["name"]) for line in lines})  # fmt: skip
        raise NotFound(f"nothing runs as {target or node!r}; there is: {', '.join(there) or 'nothing'}")  # fmt: skip
    for line in mine:
        api.post("/api/drain", {"allocation": line["allocation"]})
    return [str(line["name"]) for line in mine]


def with_logs(ctx: Context, lines: Iterable[Line], state_dir: Path | None) -> list[Line]:
    """Lines of `ps` with the path of their log, where it can be read from here."""
    folders = Folders(ctx, state_dir)
    found = ((line, log_of(folders.of(line["site"], line["name"]))) for line in lines)
    return [line | {"log": log and str(log)} for line, log in found]


class Folders:
    """Where allocations have their folders, by site."""

    def __init__(self, ctx: Context, state_dir: Path | None = None) -> None:
        sites = list(_readable(ctx))
        here = [site.state_dir for site in sites if site.scheduler == SITE]
        self._here = [(state_dir or local_folder(ctx)).absolute(), *here]
        self._clusters = {site.name: site for site in sites if site.scheduler != SITE}

    def of(self, site: str, name: str) -> Path:
        """The folder of an allocation; one that does not exist if it is not seen from here."""
        cluster = self._clusters.get(site)
        if cluster is not None:
            return folder_of(cluster, name)
        every = [folder / name for folder in self._here]
        return next(filter(Path.is_dir, every), every[0])


def _here(
    ctx: Context,
    target: str,
    site: LocalSite,
    options: Mapping[str, Any],
    *,
    wait: bool,
    timeout_s: float | None,
) -> str:
    given = [f"--{name}" for name in _OF_CLUSTERS if options.get(name) is not None]
    if given:
        raise click.UsageError(f"{', '.join(given)}: for a cluster; name it by --site. Here workers see what there is")  # fmt: skip
    facts: dict[str, Any] = {}
    if options.get("replicas") is not None:
        facts["slots"] = options["replicas"]
    if options.get("walltime_s") is not None:
        facts["walltime_min"] = max(1, int(options["walltime_s"] // 60))
    device = options.get("device")
    return bring_up(ctx, target, site, facts, device=device, wait=wait, timeout_s=timeout_s)


def _meant(line: Line, target: str | None, node: str | None) -> bool:
    if node is not None:
        return bool(line["node"]) and node in (line["node"], line["node"].partition(".")[0])
    return target in (line["name"], line["allocation"], line["deployment"])


def _readable(ctx: Context) -> Iterable[Site]:
    """The sites whose files are in order."""
    for path in site_files(ctx):
        try:
            yield load_site(path)
        except SettingsError as error:
            click.echo(str(error), err=True)
