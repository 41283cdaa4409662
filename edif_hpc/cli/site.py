"""`edif-hpc site`: the facts of a cluster, in a file that the operator owns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.show import json_option, listing, print_json

if TYPE_CHECKING:
    from edif_hpc.slurm.site import Site

COLUMNS = ("name", "scheduler", "gpus", "state_dir", "file")

site_option = click.option(
    "--site",
    metavar="NAME|FILE",
    envvar="EDIF_SITE",
    required=True,
    help="A site's file, or its name among those of `edif-hpc site ls`.",
)


@click.group()
def site() -> None:
    """The facts of a cluster."""


@site.command()
@json_option
@pass_context
def ls(ctx: Context, /, *, as_json: bool) -> None:
    """List the sites that have a file."""
    from edif_hpc.slurm.site import load_site

    found = [_row(path, load_site(path)) for path in sorted(_folder(ctx).glob("*.toml"))]
    if as_json:
        print_json(found)
    else:
        none = f"no sites in {_folder(ctx)}; copy an example there, from the folder slurm of the project"
        listing([each | {"gpus": ", ".join(each["gpus"])} for each in found], COLUMNS, none=none)


def find_site(ctx: Context, which: str) -> Site:
    """A site by its name or its file.

    Raises:
        SettingsError: there is none, or its file is wrong.
    """
    from edif_hpc.errors import SettingsError
    from edif_hpc.slurm.site import load_site

    named = _folder(ctx) / f"{which}.toml"
    path = named if named.is_file() else Path(which).expanduser()
    if not path.is_file():
        known = ", ".join(sorted(each.stem for each in _folder(ctx).glob("*.toml"))) or "none yet"
        raise SettingsError(
            f"there is no site {which!r}: no file of that name, and {_folder(ctx)} has {known}; copy an example there, from the folder slurm of the project"
        )
    return load_site(path)


def _folder(ctx: Context) -> Path:
    return ctx.config_file.parent / "sites"


def _row(path: Path, facts: Site) -> dict[str, Any]:
    return {
        "name": facts.name,
        "scheduler": facts.scheduler,
        "gpus": list(facts.gpus),
        "state_dir": str(facts.state_dir),
        "file": str(path),
    }
