"""`edif-hpc explain` and `logs`: why a slot is as it is, and what was said in it."""

from __future__ import annotations

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.show import json_option, print_json


@click.command()
@click.argument("target", metavar="DEPLOYMENT[/SLOT]")
@json_option
@pass_context
def explain(ctx: Context, /, *, target: str, as_json: bool) -> None:
    """Tell why a deployment's slots are as they are.

    What was decided and why, what is expected, the generations and how they ended, the launcher, the nodes left out.
    """
    from edif_hpc.cli.allocations.explaining import lines, slots

    found = slots(ctx.api(), target)
    if as_json:
        print_json(found)
    for each in () if as_json else found:
        for line in lines(each):
            click.echo(line)


@click.command()
@click.argument("target", metavar="DEPLOYMENT|ALLOCATION")
@click.option("-n", "--lines", "count", type=click.IntRange(1), default=40, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on until interrupted.")
@json_option
@pass_context
def logs(ctx: Context, /, *, target: str, count: int, follow: bool, as_json: bool) -> None:
    """Show the log of a deployment's newest allocation, or of the one that is named.

    It is what its pilot and worker said. Of allocations whose folder is not seen from here, the relay has the last words.
    """
    from edif_hpc.cli.allocations.explaining import follow_log, found_log

    found = found_log(ctx, target, count)
    if as_json:
        print_json(found)
        return
    click.echo(f"{found['name']}: {found['log'] or 'its folder is not seen from here; these are its last words'}", err=True)  # fmt: skip
    for line in found["lines"]:
        click.echo(line)
    if follow:
        follow_log(found)
