"""`edif-hpc deployment`: what the relay is to serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.limits import given, limit_options, said, shown
from edif_hpc.cli.show import facts, json_option, listing, moment, print_json
from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.levels import Level
from edif_hpc.errors import NotFound

COLUMNS = (
    "name",
    "repo_id",
    "revision",
    "task",
    "dtype",
    "device",
    "replicas",
    "executors",
    "isolation_floor",
    "adapters",
)


@click.group()
def deployment() -> None:
    """What the relay is to serve."""


@deployment.command()
@click.argument("model")
@click.option("--name", help="Its name; else made from the model's.")
@click.option("--revision", help="Branch, tag or commit; else the default branch.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    help="The pipeline, as nnsight names it; may be given several times, all over one set of weights.  "
    "[default: text-generation]",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16", "auto"]))
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="cuda is a GPU, of NVIDIA or AMD."
)
@click.option(
    "--weights",
    type=click.Choice(["auto", "private", "shared"]),
    help="On a GPU: a copy for each request, or one that they share and that is restored after each.",
)
@click.option("--replicas", type=click.IntRange(0, 1000), help="How many workers are wanted.")
@click.option(
    "--executors", type=click.IntRange(1, 1000), help="Requests a worker runs at a time."
)
@click.option("--source", metavar="PATH", help="Load from this folder of the worker's machine.")
@click.option("--trust-remote-code", is_flag=True, default=None, help="Run the model's own code.")
@click.option(
    "--isolation-floor",
    type=click.Choice([str(each) for each in Level]),
    help="The weakest isolation to serve with.  [default: no-namespaces]",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="ORG/NAME[@REVISION]",
    help="Serve this PEFT adapter with it; may be given several times.",
)
@limit_options
@json_option
@pass_context
def add(ctx: Context, /, *, model: str, as_json: bool, **options: Any) -> None:
    """Add a deployment of MODEL, an ORG/NAME of the Hub or a folder.

    Researchers ask for a model by the name that is given here.
    """
    from edif_hpc.cli.model import deployment_of

    limits = said(options)
    body = deployment_of(model, options) | ({"limits": limits} if limits else {})
    added = ctx.api().post("/api/deployments", body)
    if as_json:
        print_json(added)
    else:
        click.echo(
            f"added {added['name']} ({added['repo_id']}); start it: edif-hpc up {added['name']}"
        )


@deployment.command()
@json_option
@pass_context
def ls(ctx: Context, /, *, as_json: bool) -> None:
    """List the deployments."""
    found = ctx.api().get("/api/deployments")["deployments"]
    if as_json:
        print_json(found)
    else:
        listing(
            [_shown(each) for each in found],
            COLUMNS,
            none="no deployments; add one: edif-hpc deployment add ORG/MODEL",
        )


@deployment.command()
@click.argument("name")
@json_option
@pass_context
def show(ctx: Context, /, *, name: str, as_json: bool) -> None:
    """Show one deployment."""
    known = {each["name"]: each for each in ctx.api().get("/api/deployments")["deployments"]}
    if name not in known:
        raise NotFound(
            f"there is no deployment {name!r}; deployed: {', '.join(known) or 'nothing yet'}"
        )
    if as_json:
        print_json(known[name])
    else:
        found = known[name]
        moments = {each: moment(found.get(each)) for each in ("created_at", "up_at")}
        facts(_shown(found) | moments)


@deployment.command(name="set")
@click.argument("name")
@limit_options
@json_option
@pass_context
def change(ctx: Context, /, *, name: str, as_json: bool, **options: Any) -> None:
    """Change what the requests of a deployment may use, from now on; `none` takes a limit back."""
    from edif_hpc.cli.api import part

    changed = ctx.api().post(f"/api/deployments/{part(name)}/limits", given(said(options)))
    if as_json:
        print_json(changed)
    else:
        click.echo(f"limits of {changed['name']}: {shown(changed['limits']) or 'none'}")


@deployment.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="End the requests that wait for it.")
@pass_context
def rm(ctx: Context, /, *, name: str, force: bool) -> None:
    """Remove a deployment and drain its workers."""
    from edif_hpc.cli.api import part

    ended = ctx.api().delete(f"/api/deployments/{part(name)}", force=force)["ended_requests"]
    click.echo(
        f"removed {name}; its workers leave" + (f"; {ended} request(s) ended" if ended else "")
    )


def _shown(found: Mapping[str, Any]) -> dict[str, Any]:
    """A deployment with its tasks and adapters as `--task` and `--adapter` take them, and its limits in words."""
    adapters = [str(Adapter(**each)) for each in found["adapters"]]
    lists = {
        "task": ", ".join([found["task"], *found["more_tasks"]]),
        "adapters": ", ".join(adapters) or None,
        "limits": shown(found.get("limits", {})),
    }
    return {name: value for name, value in {**found, **lists}.items() if name != "more_tasks"}
