"""`edif-hpc env`: what a request finds where it runs, and what it may do there."""

from __future__ import annotations

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.show import json_option, print_json


@click.command()
@click.argument("deployment", metavar="[DEPLOYMENT|MODEL]", required=False)
@click.option("--packages", is_flag=True, help="List all packages, not only the usual ones.")
@click.option(
    "--compare",
    is_flag=True,
    help="Compare with the Python that runs this command: where numbers may differ.",
)
@json_option
@pass_context
def env(
    ctx: Context,
    /,
    *,
    deployment: str | None,
    packages: bool,
    compare: bool,
    as_json: bool,
) -> None:
    """What a request finds where it runs, and what it may do there.

    Packages, stores, limits, and what the level of isolation allows. A researcher's token is enough. Python is not restricted: whatever the image has can be imported. What the operating system
    lets a request do is told line by line, for the level that the deployment's workers have reached.
    """
    from edif_hpc.cli.environments import asked, compared, shown

    found = asked(ctx.api(), deployment)
    if as_json:
        print_json(found if not compare else [each | compared(each) for each in found])
        return
    if not found:
        click.echo("nothing is deployed")
    for number, each in enumerate(found):
        if number:
            click.echo()
        for line in shown(each, packages=packages, compare=compare):
            click.echo(line)
