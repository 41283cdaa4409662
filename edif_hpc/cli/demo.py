"""`edif-hpc demo`: all of it on this machine, with nothing left behind."""

from __future__ import annotations

import click

from edif_hpc.cli.context import Context, pass_context


@click.command()
@click.option("--keep", is_flag=True, help="Leave it running, and say how to use and end it.")
@click.option("--stop", is_flag=True, help="End what --keep left running.")
@pass_context
def demo(ctx: Context, /, *, keep: bool, stop: bool) -> None:
    """Try all of it on this machine.

    A relay, a worker and a model hub on the loopback interface; then ordinary nnsight code in a process of its own, whose
    values are compared with those of a local run. Exits with 1 if any differs.
    """
    from edif_hpc.cli.showing import show, stop_kept

    if keep and stop:
        raise click.UsageError("--keep and --stop exclude each other")
    if stop:
        stop_kept(ctx)
    else:
        show(ctx, keep=keep)
