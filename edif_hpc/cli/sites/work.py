"""What `edif-hpc site init` and `site check` do: write a site's file, check it, probe its nodes, and tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.context import Context
from edif_hpc.cli.exits import Exit
from edif_hpc.cli.show import print_json
from edif_hpc.cli.sites.checks import examine_site
from edif_hpc.cli.sites.file import text_of, with_may_submit, write
from edif_hpc.cli.sites.probing import Probing
from edif_hpc.cli.sites.proposing import Asker, propose
from edif_hpc.errors import Conflict, EdifError
from edif_hpc.slurm.detect import detect
from edif_hpc.slurm.finding import Finding, Grade
from edif_hpc.slurm.order import write_private
from edif_hpc.slurm.site import Site, load_site


def found(ctx: Context, folder: Path, options: Mapping[str, Any]) -> Path:
    """Detect, ask, and write a file; returns its path."""
    given = {name: value for name, value in options.items() if value is not None}
    named = folder / f"{given.get('name', '')}.toml"
    if named.exists() and not given["force"]:  # before anything is asked
        raise Conflict(f"{named} exists; look at it with: edif-hpc site check {named.stem}; --force writes it anew")  # fmt: skip
    home = ctx.environ.get("HOME") or str(Path.home())
    answers = propose(detect(), given, Asker(given, yes=given["yes"]), home=home)
    path = folder / f"{answers.name}.toml"
    write(path, text_of(answers), force=given["force"])
    click.echo(f"wrote {path}", err=True)
    return path


def report(ctx: Context, path: Path, *, probe: bool, timeout_s: float, as_json: bool) -> None:
    """Check a site and show what was found; ends with a failure if anything failed."""
    site = load_site(path)
    shown: list[dict[str, Any]] = []
    for gpu, finding in _all(ctx, path, site, probe=probe, timeout_s=timeout_s):
        shown.append(finding.as_dict() | {"gpu": gpu, "probe": gpu is not None})
        if not as_json:
            click.echo(f"{finding.grade:<4}  {f'{gpu}: node: ' if gpu else ''}{str(finding)[6:]}")
    if as_json:
        print_json({"site": site.name, "file": str(path), "findings": shown})
    elif not probe:
        click.echo(
            f"nodes were not looked at; do so with: edif-hpc site check {site.name} --probe"
        )
    if any(each["grade"] == Grade.FAIL for each in shown):
        click.get_current_context().exit(Exit.FAILED)


def _all(
    ctx: Context, path: Path, site: Site, *, probe: bool, timeout_s: float
) -> Iterator[tuple[str | None, Finding]]:
    """What was found, each with the kind of GPU whose node told it."""
    failed = False
    for finding in examine_site(site):
        failed = failed or finding.grade is Grade.FAIL
        yield None, finding
    if not probe or site.scheduler != "slurm":
        return
    if failed:
        click.echo("there is no probe while a check fails; mend it first", err=True)
        return
    probing = Probing(site=site, urls=_urls(ctx), patience_s=timeout_s)
    yield from probing.findings()
    if probing.may_submit is not None:
        _fill_in(path, site, may=probing.may_submit)


def _urls(ctx: Context) -> tuple[str, ...]:
    """What nodes have to reach: the relay as commands do, and what it says besides."""
    api = ctx.api()
    try:
        told = api.get("/api/launcher/addresses")["urls"]
    except EdifError as error:
        click.echo(f"the relay did not say where its workers connect: {error}", err=True)
        told = []
    return tuple(dict.fromkeys([api.url, *told]))


def _fill_in(path: Path, site: Site, *, may: bool) -> None:
    """Write into the file what it left open; contradict it if it says otherwise."""
    changed = with_may_submit(path.read_text(), may=may)
    if changed is not None:
        write_private(path, changed.encode())
        click.echo(f"noted in {path}: compute_may_submit = {str(may).lower()}", err=True)
    elif site.compute_may_submit and not may:
        click.echo(f"{path} says compute_may_submit = true, and sbatch does not work on the nodes: set it to false", err=True)  # fmt: skip
