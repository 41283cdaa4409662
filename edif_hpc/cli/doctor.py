"""`edif-hpc doctor`: check this machine and its relay."""

from __future__ import annotations

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.exits import Exit
from edif_hpc.cli.show import json_option, print_json


@click.command()
@json_option
@click.pass_context
@pass_context
def doctor(ctx: Context, /, click_ctx: click.Context, *, as_json: bool) -> None:
    """Check this machine and its relay.

    Each line says OK, WARN or FAIL, and the way out. Exits with 1 if anything failed.
    """
    from edif_hpc.cli.checks import examine
    from edif_hpc.slurm.finding import Grade

    found = []
    for finding in examine(ctx):
        found.append(finding)
        if not as_json:
            click.echo(str(finding))
    if as_json:
        print_json([each.as_dict() for each in found])
    if any(each.grade is Grade.FAIL for each in found):
        click_ctx.exit(Exit.FAILED)
