"""`edif-hpc launcher`: carry out the relay's orders at a site's scheduler."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.params import Duration
from edif_hpc.cli.site import site_option

if TYPE_CHECKING:
    from edif_hpc.launcher.forward import Forwarder
    from edif_hpc.launcher.runtime import Launcher
    from edif_hpc.slurm.site import Site

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
@click.option(
    "--forward",
    is_flag=False,
    flag_value="",
    metavar="[HOST:PORT]",
    help="Be the forwarder of the route `login` too (see `launcher forward`).",
)
@pass_context
def run(ctx: Context, /, *, site: str, interval_s: float, forward: str | None) -> None:
    """Go on until interrupted: a round every few seconds, slower while the relay is away."""
    from edif_hpc.launcher.daemon import serve
    from edif_hpc.launcher.runtime import only_one

    made = launcher_of(ctx, site)
    with ExitStack() as stack:
        stack.enter_context(only_one(made.site))
        click.echo(f"launcher {made.name} of the site {made.site.name}, for {made.relay.url}")
        if forward is not None:
            _forward_beside(ctx, made.site, forward, stack)
        serve(made, interval_s=interval_s, tell=click.echo)


@launcher.command()
@site_option
@pass_context
def once(ctx: Context, /, *, site: str) -> None:
    """One round, for cron or scrontab: `* * * * * edif-hpc launcher once --site NAME`."""
    from edif_hpc.launcher.runtime import only_one

    made = launcher_of(ctx, site)
    with only_one(made.site):
        for line in made.round().lines():
            click.echo(line)


@launcher.command()
@site_option
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="",
    help="Where compute nodes reach this machine; port 0 takes any.  [default: its name, any port]",
)
@pass_context
def forward(ctx: Context, /, *, site: str, listen: str) -> None:
    """Pass compute nodes on to the relay, where they reach only the login node (route = "login").

    It passes on to the relay and its object store alone, for those who know the secret in the site's state_dir (forward.json);
    there pilots also read where it is. What passes stays encrypted end to end. It may be restarted, also on another login node.
    """
    from edif_hpc.cli.site import find_site
    from edif_hpc.launcher.forward import serve
    from edif_hpc.telemetry import set_up_logging

    made = _forwarder(ctx, find_site(ctx, site), listen)
    set_up_logging("info", process="forwarder")
    serve(made, tell=click.echo)


def _forward_beside(ctx: Context, site: Site, listen: str, stack: ExitStack) -> None:
    from edif_hpc.launcher.forward import beside
    from edif_hpc.telemetry import set_up_logging

    made = _forwarder(ctx, site, listen)
    set_up_logging("info", process="launcher")
    address = stack.enter_context(beside(made))
    click.echo(f"forwarding from {address} to {made.relay.url}")


def _forwarder(ctx: Context, site: Site, listen: str) -> Forwarder:
    from edif_hpc.errors import InvalidInput, SettingsError
    from edif_hpc.launcher.forward import Forwarder, own_host
    from edif_hpc.wire.streams import Address

    if site.route != "login":
        raise SettingsError(
            f'the site {site.name} has route = {site.route!r}, so its pilots would not come here; set route = "login"'
        )
    try:
        address = Address.parse(listen) if listen else Address(own_host(), 0)
    except InvalidInput as error:
        raise click.BadParameter(str(error)) from error
    return Forwarder(site=site, relay=ctx.api(), listen=address)


def launcher_of(ctx: Context, site: str) -> Launcher:
    """The launcher of a site, on this machine."""
    from edif_hpc.cli.site import find_site, site_file
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
        site_file=site_file(ctx, site).absolute(),
    )
