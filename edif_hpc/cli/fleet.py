"""`edif-hpc up`, `down`, `scale`, `drain` and `ps`: the workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.params import Duration
from edif_hpc.cli.show import json_option, listing, print_json, talking

COLUMNS = (
    "slot", "generation", "job_id", "node", "state", "detail", "isolation", "leases", "since", "left", "successor",
)  # fmt: skip

state_dir_option = click.option(
    "--state-dir",
    type=click.Path(file_okay=False, path_type=Path),
    envvar="EDIF_STATE_DIR",
    help="Folder of orders, logs and scratch of the local site.",
)
wait_option = click.option(
    "--wait/--no-wait",
    default=None,
    callback=lambda _ctx, _param, value: sys.stdout.isatty() if value is None else value,
    help="Wait until it is so.  [default: on a terminal]",
)
timeout_option = click.option(
    "--timeout", "timeout_s", type=Duration(), help="Longest wait, as 30min."
)


@click.command()
@click.argument("target", metavar="DEPLOYMENT|MODEL")
@click.option(
    "--site",
    "where",
    metavar="NAME|FILE",
    envvar="EDIF_SITE",
    default="local",
    help="A cluster of `edif-hpc site ls`.  [default: this machine]",
)
@click.option("--gpu", metavar="KIND", help="A kind of GPU of the site.")
@click.option("--gpus", type=click.IntRange(0, 256), help="How many of them for each worker.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    help="Of a MODEL that is added: what it is computed on; cuda is a GPU, of NVIDIA or AMD.  [default: cuda where a GPU is asked for]",
)
@click.option("--replicas", type=click.IntRange(1, 1000), help="How many workers are wanted.")
@click.option(
    "--walltime",
    "walltime_s",
    type=Duration(),
    help="Of one allocation, as 8h.  [default: the longest]",
)
@click.option("--threads", type=click.IntRange(0), default=0, help="Of one executor; 0: all.")
@click.option("--ready", type=click.IntRange(1), default=2, help="Executors kept ready.")
@click.option(
    "--isolation-ceiling",
    type=click.Choice(["full", "no-namespaces", "process"]),
    default="full",
    help="The strongest isolation to try.",
)
@click.option(
    "--store",
    "stores",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder that requests may read, such as data sets; may be given again.",
)
@click.option(
    "--library",
    "libraries",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A folder of more Python packages (pip install --target); may be given again.",
)
@click.option("--hub-endpoint", metavar="URL", envvar="HF_ENDPOINT", help="Where models are.")
@click.option("--hub-cache", metavar="PATH", envvar="HF_HUB_CACHE", help="Where they are kept.")
@click.option("--hub-token", envvar="HF_TOKEN", hidden=True)
@state_dir_option
@wait_option
@timeout_option
@json_option
@pass_context
def up(
    ctx: Context,
    /,
    *,
    target: str,
    where: str,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Start workers for the free slots of a deployment.

    A MODEL that is not deployed yet is added first. Workers go on when this command is interrupted or its terminal closed;
    end them with `edif-hpc down`.

    At a cluster (--site) the relay keeps the slots filled from then on: allocations are replaced before their walltime ends.
    What runs there, with what threads and which models, is in the site's file; the options for it are of this machine alone, and
    so is HF_TOKEN, the token for gated models.
    """
    from edif_hpc.cli.allocations.place import place, with_logs
    from edif_hpc.cli.allocations.targets import processes

    with talking(as_json=as_json):
        name = place(ctx, target, where, options, wait=wait, timeout_s=timeout_s)
    if as_json:
        print_json(with_logs(ctx, processes(ctx.api(), name), options["state_dir"]))


@click.command()
@click.argument("targets", metavar="[DEPLOYMENT|MODEL]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All deployments.")
@wait_option
@timeout_option
@json_option
@pass_context
def down(
    ctx: Context,
    /,
    *,
    targets: tuple[str, ...],
    everything: bool,
    wait: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """End workers: they finish what runs, leave, and are not replaced."""
    from edif_hpc.cli.allocations.down import bring_down

    if bool(targets) is everything:
        raise click.UsageError("name a deployment, or give --all")
    with talking(as_json=as_json):
        names = bring_down(ctx, targets, wait=wait, timeout_s=timeout_s)
    if as_json:
        print_json(names)


@click.command()
@click.argument("target", metavar="DEPLOYMENT|MODEL")
@click.argument("replicas", type=click.IntRange(0, 1000))
@json_option
@pass_context
def scale(ctx: Context, /, *, target: str, replicas: int, as_json: bool) -> None:
    """Change how many workers a deployment has.

    Those that are too many finish what runs, and leave. New ones start where the deployment is up.
    """
    from edif_hpc.cli.allocations.place import rescale

    told = rescale(ctx, target, replicas)
    if as_json:
        print_json(told)
    else:
        click.echo(f"{told['deployment']}: {replicas} replica(s); see how it goes: edif-hpc ps")


@click.command()
@click.argument("target", metavar="[DEPLOYMENT|ALLOCATION]", required=False)
@click.option("--node", help="All allocations on this node.")
@json_option
@pass_context
def drain(ctx: Context, /, *, target: str | None, node: str | None, as_json: bool) -> None:
    """Have allocations replaced: they finish what runs, and leave.

    At a cluster the relay fills their slots again (after a change of the image, or before work on a node); on this machine
    `edif-hpc up` does. To end a deployment, use `edif-hpc down`.
    """
    from edif_hpc.cli.allocations.place import replace

    if (target is None) is (node is None):
        raise click.UsageError("name a deployment or an allocation, or give --node")
    drained = replace(ctx, target, node)
    if as_json:
        print_json(drained)
    else:
        click.echo(f"{len(drained)} allocation(s) drain: {', '.join(drained)}")


@click.command()
@state_dir_option
@json_option
@pass_context
def ps(ctx: Context, /, *, state_dir: Path | None, as_json: bool) -> None:
    """List the allocations: their workers, what they do or wait for, and who follows."""
    from edif_hpc.cli.allocations.place import with_logs
    from edif_hpc.cli.allocations.words import rows

    lines = ctx.api().get("/api/ps")["processes"]
    if as_json:
        print_json(with_logs(ctx, lines, state_dir))
    else:
        listing(rows(lines), COLUMNS, none="no workers; start some: edif-hpc up DEPLOYMENT")
