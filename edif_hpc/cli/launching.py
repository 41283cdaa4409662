"""Bringing workers up and down: what `up`, `down` and `ps` do between the relay and a site."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.api import Api
from edif_hpc.cli.context import Context
from edif_hpc.cli.local import SITE, LocalSite, runs_here
from edif_hpc.cli.model import deployment_of, looks_like_a_model, looks_like_a_path
from edif_hpc.cli.show import Progress, duration
from edif_hpc.cli.watch import watch
from edif_hpc.clock import SystemClock
from edif_hpc.errors import LaunchError, NotFound
from edif_hpc.slurm.order import EngineFacts

Line = dict[str, Any]


def bring_up(
    ctx: Context, target: str, options: Mapping[str, Any], *, wait: bool, timeout_s: float | None
) -> None:
    """Fill the free slots of a deployment; a model that is not deployed is added."""
    api, site = ctx.api(), local_site(ctx, options)
    name = _deployment(api, target)
    for line in filter(_died_unheard, _processes(api)):
        if line["deployment"] == name:
            _bury(api, site, line)
    made = api.post("/api/allocations", {"deployment": name, "site": options["site"]})[
        "allocations"
    ]
    site.launch(api, made)
    for each in made:
        click.echo(f"started {each['name']}")
    mine = [line for line in _processes(api) if line["deployment"] == name]
    if not mine and not made:
        click.echo(f"{name} wants no replicas; nothing to start")
    elif wait:
        names = {line["name"] for line in mine} | {each["name"] for each in made}
        _until_warm(api, site, names, timeout_s)
    else:
        click.echo("see how it goes: edif-hpc ps")


def bring_down(
    ctx: Context, deployment: str | None, *, wait: bool, timeout_s: float | None
) -> None:
    """Drain a deployment, or everything."""
    api = ctx.api()
    before = [line for line in _processes(api) if deployment in {None, line["deployment"]}]
    if deployment is not None and not before:
        _check_known(api, deployment)
    asked = {} if deployment is None else {"deployment": deployment}
    count = api.post("/api/drain", asked)["allocations"]
    click.echo(f"{count} allocation(s) drain" if count else "nothing to drain")
    if wait and before:
        _until_gone(api, before, timeout_s)


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
    )
    folder = options.get("state_dir") or ctx.state_dir / "local"
    return LocalSite(folder=folder.absolute(), engine=engine)


def rows(lines: Iterable[Line]) -> Iterator[Line]:
    """The lines of `ps` as people read them."""
    now = SystemClock().wall()
    for line in lines:
        worker = line["worker"] or {}
        yield line | {
            "slot": _slot(line),
            "state": worker.get("state", line["state"]),
            "detail": _detail(line),
            "isolation": worker.get("isolation"),
            "leases": worker.get("leases", 0),
            "since": duration(max(0.0, now - (line["warm_at"] or line["submitted_at"]))),
        }


def _deployment(api: Api, target: str) -> str:
    """The name of the deployment that is meant."""
    if not looks_like_a_model(target):
        return target
    wanted = deployment_of(target, {})
    for known in api.get("/api/deployments")["deployments"]:
        if known["repo_id"].lower() == wanted["repo_id"].lower():
            return str(known["name"])
    name = str(api.post("/api/deployments", wanted)["name"])
    click.echo(f"added the deployment {name} of {wanted['repo_id']}")
    if looks_like_a_path(target):
        click.echo(
            "  (to serve it under a Hub name: edif-hpc deployment add ORG/NAME --source PATH)"
        )
    return name


def _check_known(api: Api, deployment: str) -> None:
    known = [each["name"] for each in api.get("/api/deployments")["deployments"]]
    if deployment not in known:
        raise NotFound(
            f"there is no deployment {deployment!r}; deployed: {', '.join(known) or 'nothing yet'}"
        )


def _until_warm(api: Api, site: LocalSite, names: set[str], timeout_s: float | None) -> None:
    progress = Progress()
    for lines in watch(
        lambda: {line["name"]: line for line in _processes(api)}, timeout_s=timeout_s
    ):
        for name in sorted(names):
            line = lines.get(name)
            if line is None or _died_unheard(line):
                progress.end()
                _report_death(api, site, name, line)
        mine = [lines[name] for name in sorted(names)]
        progress.tell(
            "; ".join(f"{_slot(line)}: {_detail(line) or line['state']}" for line in mine)
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


def _until_gone(api: Api, before: list[Line], timeout_s: float | None) -> None:
    progress = Progress()
    left = before
    names = {line["name"] for line in before}
    for lines in watch(lambda: _processes(api), timeout_s=timeout_s):
        listed = {line["name"]: line for line in lines if line["name"] in names}
        left = [*listed.values()]
        left += [line for line in before if line["name"] not in listed and runs_here(line)]
        if not left:
            progress.end()
            click.echo("gone")
            return
        progress.tell("still there: " + "; ".join(map(_remaining, left)))
    progress.end()
    raise LaunchError(
        f"not gone within {duration(timeout_s or 0)}: {'; '.join(map(_remaining, left))}"
    )


def _remaining(line: Line) -> str:
    running = (line["worker"] or {}).get("running", 0)
    doing = f"runs {running} request(s)" if running else line["state"]
    return f"{line['name']} on {line['node'] or line['site']} (job {line['job_id']}) {doing}"


def _processes(api: Api) -> list[Line]:
    found: list[Line] = api.get("/api/ps")["processes"]
    return found


def _slot(line: Line) -> str:
    return f"{line['deployment']}/{line['slot']}"


def _detail(line: Line) -> str:
    progress = (line["worker"] or {}).get("progress")
    return (
        f"{line['detail']} {progress:.0%}".strip() if progress is not None else str(line["detail"])
    )


def _hub_cache(environ: Mapping[str, str]) -> str:
    home = environ.get("HF_HOME") or f"{environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return f"{home}/hub"
