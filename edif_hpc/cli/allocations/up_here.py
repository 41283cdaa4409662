"""Bringing workers up on this machine: what `edif-hpc up` does between the relay and the `local` site."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.allocations.local import SITE, LocalSite, runs_here
from edif_hpc.cli.allocations.targets import Line, add_if_new, processes, slot_of
from edif_hpc.cli.allocations.words import doing
from edif_hpc.cli.api import Api
from edif_hpc.cli.context import Context
from edif_hpc.cli.show import Progress, duration
from edif_hpc.cli.watch import watch
from edif_hpc.errors import InvalidInput, LaunchError
from edif_hpc.slurm.order import EngineFacts
from edif_hpc.slurm.site import holding


def bring_up(
    ctx: Context,
    target: str,
    site: LocalSite,
    facts: Mapping[str, Any],
    *,
    device: str | None = None,
    wait: bool,
    timeout_s: float | None,
) -> str:
    """Fill the free slots of a deployment on this machine; a model that is not deployed is added. Returns its name."""
    api = ctx.api()
    name = add_if_new(api, target, device=device, usual="cpu")
    mine = processes(api, name)
    for line in filter(_died_unheard, mine):
        _bury(api, site, line)
    asked = {"deployment": name, "site": SITE, **facts}
    made = api.post("/api/allocations", asked)["allocations"]
    site.launch(api, made)
    for each in made:
        click.echo(f"started {each['name']}")
    names = {line["name"] for line in mine if not _died_unheard(line)}
    names |= {each["name"] for each in made}
    if not names:
        click.echo(f"{name} wants no replicas; nothing to start")
    elif wait:
        _until_warm(api, site, names, timeout_s)
    else:
        click.echo("see how it goes: edif-hpc ps")
    return name


def local_site(ctx: Context, options: Mapping[str, Any]) -> LocalSite:
    """This machine, with what the options and the environment say of its engines."""
    cache = options.get("hub_cache") or _hub_cache(ctx.environ)
    engine = EngineFacts(
        hub_endpoint=options.get("hub_endpoint"),
        hub_cache=str(Path(cache).expanduser().absolute()),
        hub_token=options.get("hub_token"),
        threads=options.get("threads", 0),
        ready=options.get("ready", 2),
        isolation_ceiling=options.get("isolation_ceiling", "full"),
        stores=_readable(ctx, "--store", options.get("stores", ())),
        libraries=_readable(ctx, "--library", options.get("libraries", ())),
    )
    folder = options.get("state_dir") or local_folder(ctx)
    return LocalSite(folder=folder.absolute(), engine=engine)


def local_folder(ctx: Context) -> Path:
    """Where this machine's allocations have their folders, if nothing else is said."""
    return Path(ctx.environ.get("EDIF_STATE_DIR") or ctx.state_dir / "local").absolute()


def _until_warm(api: Api, site: LocalSite, names: set[str], timeout_s: float | None) -> None:
    progress = Progress()
    for lines in watch(
        lambda: {line["name"]: line for line in processes(api)}, timeout_s=timeout_s
    ):
        for name in sorted(names):
            line = lines.get(name)
            if line is None or _died_unheard(line):
                progress.end()
                _report_death(api, site, name, line)
        mine = [lines[name] for name in sorted(names)]
        progress.tell(
            "; ".join(f"{slot_of(line)}: {doing(line) or line['state']}" for line in mine)
        )
        if all(line["state"] == "warm" for line in mine):
            progress.end()
            return
    progress.end()
    raise LaunchError(f"not warm within {duration(timeout_s or 0)}; it goes on, see: edif-hpc ps")


def _died_unheard(line: Line) -> bool:
    """Whether a pilot of this machine is gone, and its worker too, without a word to the relay."""
    here = line["site"] == SITE and line["node"] in {None, os.uname().nodename}
    return here and bool(line["job_id"]) and line["worker"] is None and not runs_here(line)


def _report_death(api: Api, site: LocalSite, name: str, line: Line | None) -> None:
    if line is not None:
        _bury(api, site, line)
    for text in site.tail(name):
        click.echo(f"  {text}", err=True)
    where = site.log(name)
    raise LaunchError(
        f"{name} ended before it was warm; its log: {where or 'not on this machine'}"
    )


def _bury(api: Api, site: LocalSite, line: Line) -> None:
    """Tell the relay that an allocation of this machine is over, so that its slot is free."""
    body = {"cause": "the pilot died", "detail": "\n".join(site.tail(line["name"]))}
    api.post(f"/api/allocations/{line['allocation']}/failed", body)


def _readable(ctx: Context, option: str, folders: Iterable[Path]) -> tuple[str, ...]:
    """Folders that requests may read; none that holds what is ours alone."""
    private = (ctx.state_dir, ctx.config_file, Path.home())
    for each in folders:
        held = holding(each, private)
        if held is not None:
            raise InvalidInput(
                f"{option} {each}: every request may read there then, and {held} is in it; name a smaller folder"
            )
    return tuple(str(each.absolute()) for each in folders)


def _hub_cache(environ: Mapping[str, str]) -> str:
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return f"{home}/hub"
