"""`edif-hpc launcher`: carry out the relay's orders at a site's scheduler."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.params import Duration
from edif_hpc.cli.site import site_option

if TYPE_CHECKING:
    from edif_hpc.launcher.runtime import Launcher

INTERVAL_S = 15.0


@click.group()
def launcher() -> None:
    """Carry out the relay's orders at a site's scheduler.

    It runs on a login node, as the user whose jobs they are.
    """


@launcher.command()
@site_option
@click.option(
    "--interval",
    "interval_s",
    type=Duration(),
    default=INTERVAL_S,
    help="Pause between rounds.  [default: 15s]",
)
@pass_context
def run(ctx: Context, /, *, site: str, interval_s: float) -> None:
    """Go on until interrupted: a round every few seconds, slower while the relay is away."""
    from edif_hpc.launcher.daemon import serve
    from edif_hpc.launcher.runtime import only_one

    made = _launcher(ctx, site)
    with only_one(made.site):
        click.echo(f"launcher {made.name} of the site {made.site.name}, for {made.relay.url}")
        serve(made, interval_s=interval_s, tell=click.echo)


@launcher.command()
@site_option
@pass_context
def once(ctx: Context, /, *, site: str) -> None:
    """One round, for cron or scrontab: `* * * * * edif-hpc launcher once --site NAME`."""
    from edif_hpc.launcher.runtime import only_one

    made = _launcher(ctx, site)
    with only_one(made.site):
        for line in made.round().lines():
            click.echo(line)


def _launcher(ctx: Context, site: str) -> Launcher:
    from edif_hpc.cli.site import find_site
    from edif_hpc.errors import SettingsError
    from edif_hpc.launcher.runtime import Launcher
    from edif_hpc.slurm.status import Slurm
    from edif_hpc.slurm.submit import SlurmSubmitter

    facts = find_site(ctx, site)
    if facts.scheduler != "slurm":
        raise SettingsError(
            f"the site {facts.name} has the scheduler {facts.scheduler!r}; a launcher serves Slurm, "
            "and `edif-hpc up` starts local workers by itself"
        )
    return Launcher(
        site=facts,
        name=f"{os.uname().nodename}-{os.getuid()}",
        relay=ctx.api(),
        scheduler=Slurm(facts),
        submitter=SlurmSubmitter(facts),
    )
