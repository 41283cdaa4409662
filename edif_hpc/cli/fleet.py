"""`edif-hpc up`, `down` and `ps`: the workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.params import Duration
from edif_hpc.cli.show import json_option, listing, print_json

COLUMNS = (
    "slot", "generation", "job_id", "node", "state", "detail", "isolation", "leases", "since",
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
@click.option("--site", type=click.Choice(["local"]), default="local", show_default=True)
@click.option("--threads", type=click.IntRange(0), default=0, help="Of one executor; 0: all.")
@click.option("--ready", type=click.IntRange(1), default=2, help="Executors kept ready.")
@click.option(
    "--isolation-ceiling",
    type=click.Choice(["full", "no-namespaces", "process"]),
    default="full",
    help="The strongest isolation to try.",
)
@click.option("--hub-endpoint", metavar="URL", envvar="HF_ENDPOINT", help="Where models are.")
@click.option("--hub-cache", metavar="PATH", envvar="HF_HUB_CACHE", help="Where they are kept.")
@click.option("--hub-token", envvar="HF_TOKEN", hidden=True)
@state_dir_option
@wait_option
@timeout_option
@pass_context
def up(ctx: Context, /, *, target: str, wait: bool, timeout_s: float | None, **site: Any) -> None:
    """Start workers for the free slots of a deployment.

    A MODEL that is not deployed yet is added first. Workers go on when this command is interrupted or its terminal closed;
    end them with `edif-hpc down`. A token for gated models comes from HF_TOKEN.
    """
    from edif_hpc.cli.launching import bring_up

    bring_up(ctx, target, site, wait=wait, timeout_s=timeout_s)


@click.command()
@click.argument("deployment", required=False)
@click.option("--all", "everything", is_flag=True, help="All deployments.")
@wait_option
@timeout_option
@pass_context
def down(
    ctx: Context,
    /,
    *,
    deployment: str | None,
    everything: bool,
    wait: bool,
    timeout_s: float | None,
) -> None:
    """Drain workers: they finish what runs, and leave."""
    from edif_hpc.cli.launching import bring_down

    if (deployment is None) is not everything:
        raise click.UsageError("name a deployment, or give --all")
    bring_down(ctx, deployment, wait=wait, timeout_s=timeout_s)


@click.command()
@state_dir_option
@json_option
@pass_context
def ps(ctx: Context, /, *, state_dir: Path | None, as_json: bool) -> None:
    """List the allocations, their workers and what they do."""
    from edif_hpc.cli.launching import local_site, rows

    lines = ctx.api().get("/api/ps")["processes"]
    if as_json:
        site = local_site(ctx, {"state_dir": state_dir})
        print_json(
            [
                line | {"log": log and str(log)}
                for line in lines
                for log in [site.log(line["name"])]
            ]
        )
    else:
        listing(rows(lines), COLUMNS, none="no workers; start some: edif-hpc up DEPLOYMENT")
