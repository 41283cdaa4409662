"""`edif-hpc hub`: what the relay's hub shows to clients (`HF_ENDPOINT=https://relay/hub`).

A model that is deployed from a folder of the relay's own disk is shown by itself. One that lies elsewhere, on the cluster's
disk, is published from there: run `hub publish` where the folder is.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.show import Progress, json_option, listing, print_json, size

if TYPE_CHECKING:
    from edif_hpc.cli.api import Api

COLUMNS = ("repo_id", "commit", "task", "weights", "code", "size", "from")


@click.group()
def hub() -> None:
    """Give clients the small files of a model."""


@hub.command()
@click.argument("name", metavar="ORG/NAME")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--task", help="The pipeline, as the Hub names it.  [default: text-generation]")
@click.option("--weights", is_flag=True, help="Also the weights, to everyone who asks.")
@click.option("--code", is_flag=True, help="Also the model's own code (*.py).")
@json_option
@pass_context
def publish(
    ctx: Context, /, *, name: str, folder: Path, as_json: bool, task: str | None, **given: bool
) -> None:
    """Publish FOLDER's configuration and tokenizer as ORG/NAME.

    It replaces what was published under that name. The weights are read too, for the commit, but stay where they are
    unless --weights.
    """
    shown = _publish(ctx.api(), folder, {"repo_id": name, "task": task, **given})
    if as_json:
        print_json(shown)
    else:
        click.echo(
            f"published {shown['repo_id']} at {shown['commit']} ({size(shown['size_bytes'])})"
        )


@hub.command()
@json_option
@pass_context
def ls(ctx: Context, *, as_json: bool) -> None:
    """List what the hub shows."""
    found = ctx.api().get("/api/hub")["models"]
    if as_json:
        print_json(found)
    else:
        rows = [each | {"size": size(each["size_bytes"])} for each in found]
        listing(
            rows,
            COLUMNS,
            none="nothing here; publish a model: edif-hpc hub publish ORG/NAME FOLDER",
        )


@hub.command()
@click.argument("name", metavar="ORG/NAME")
@pass_context
def rm(ctx: Context, *, name: str) -> None:
    """Show a published model no more."""
    from edif_hpc.cli.api import part
    from edif_hpc.objects.repository import check_repo_id

    org, _, model = check_repo_id(name).partition("/")
    ctx.api().delete(f"/api/hub/{part(org)}/{part(model)}")
    click.echo(f"{name} is not published any more")


def _publish(api: Api, folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Announce, send what the relay lacks, and have it shown."""
    from dataclasses import asdict

    from edif_hpc.domain.deployment import DEFAULT_TASK
    from edif_hpc.objects.repository import read_manifest

    progress = Progress()
    progress.tell(f"reading {folder}")
    described["task"] = described["task"] or DEFAULT_TASK
    begun = api.post("/api/hub", described | asdict(read_manifest(folder)))
    place = f"/api/hub/uploads/{begun['upload']}"
    for file in begun["missing"]:
        progress.tell(f"sending {file}")
        api.put_file(f"{place}/{file}", folder / file)
    progress.end()
    shown: dict[str, Any] = api.post(place, {})
    return shown
