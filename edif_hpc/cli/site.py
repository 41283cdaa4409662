"""`edif-hpc site`: the facts of a cluster, in a file that the operator owns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.params import Duration
from edif_hpc.cli.show import facts, json_option, listing, print_json

if TYPE_CHECKING:
    from edif_hpc.slurm.site import Site

COLUMNS = ("name", "scheduler", "gpus", "state_dir", "file")
_HELP = "edif-hpc site init"
_F = TypeVar("_F", bound=Callable[..., Any])

site_option = click.option(
    "--site",
    metavar="NAME|FILE",
    envvar="EDIF_SITE",
    required=True,
    help="A site's file, or its name among those of `edif-hpc site ls`.",
)


def probe_options(command: _F) -> _F:
    """What a probe takes."""
    probe = click.option(
        "--probe",
        is_flag=True,
        help="Look at a node of each kind, in an allocation of two minutes.",
    )
    patience = click.option(
        "--timeout", "timeout_s", type=Duration(), default=600.0, help="Longest wait for the probes.  [default: 10min]"
    )  # fmt: skip
    return probe(patience(command))


@click.group()
def site() -> None:
    """The facts of a cluster."""


@site.command()
@click.argument("name", required=False)
@click.option("--state-dir", metavar="PATH", help="Folder that login and compute nodes share.")
@click.option("--scratch", metavar="PATH", help="Fast folder of a node; may hold $VARIABLES.")
@click.option("--account", help="Account to charge.")
@click.option("--qos", help="QOS of the jobs.")
@click.option("--partition", multiple=True, help="Only GPUs of this partition; repeatable.")
@click.option("--gpu", multiple=True, help="Only GPUs of this type; repeatable.")
@click.option("--vendor", type=click.Choice(["nvidia", "amd", "none"]), help="Of all its GPUs.")
@click.option("--image", metavar="SIF", help="Image that workers run in.")
@click.option("--hub-cache", metavar="PATH", help="Folder with models, shared by nodes.")
@click.option("--python", metavar="PATH", help="The Python with edif-hpc on compute nodes.")
@click.option("--setup", multiple=True, metavar="LINE", help="Bash before each job; repeatable.")
@click.option(
    "--compute-may-submit/--no-compute-may-submit",
    default=None,
    help="Whether sbatch works on compute nodes.  [default: left open]",
)
@click.option(
    "--route",
    type=click.Choice(["direct", "socks", "connect", "login"]),
    help="How nodes reach the relay.  [default: direct]",
)
@click.option("--proxy", metavar="HOST:PORT", help="Of the routes socks and connect.")
@click.option("--yes", is_flag=True, help="Ask nothing, take the defaults.")
@click.option("--force", is_flag=True, help="Write over a file that exists.")
@probe_options
@json_option
@pass_context
def init(ctx: Context, /, *, as_json: bool, **options: Any) -> None:
    """Write the file of this cluster.

    Run it on a login node. It asks Slurm for partitions, GPUs, limits and accounts, and you for the rest; each question has
    an option. Then sbatch says whether it would take the jobs (nothing is submitted but the probes of --probe).
    """
    from edif_hpc.cli.sites.work import found, report

    made = found(ctx, _folder(ctx), options)
    report(ctx, made, probe=options["probe"], timeout_s=options["timeout_s"], as_json=as_json)


@site.command()
@click.argument("which", metavar="NAME|FILE")
@probe_options
@json_option
@pass_context
def check(ctx: Context, /, *, which: str, probe: bool, timeout_s: float, as_json: bool) -> None:
    """Check a site's file against its cluster.

    sbatch says whether it would take each kind of job; with --probe the nodes are looked at too, and what was left open in
    the file is filled in. Exits with 1 if anything failed.
    """
    from edif_hpc.cli.sites.work import report

    report(ctx, site_file(ctx, which), probe=probe, timeout_s=timeout_s, as_json=as_json)


@site.command()
@json_option
@pass_context
def ls(ctx: Context, /, *, as_json: bool) -> None:
    """List the sites that have a file."""
    from edif_hpc.slurm.site import load_site

    found = [_row(path, load_site(path)) for path in site_files(ctx)]
    if as_json:
        print_json(found)
    else:
        none = f"no sites in {_folder(ctx)}; on a login node: {_HELP}"
        listing([each | {"gpus": ", ".join(each["gpus"])} for each in found], COLUMNS, none=none)


@site.command()
@click.argument("which", metavar="NAME|FILE")
@json_option
@pass_context
def show(ctx: Context, /, *, which: str, as_json: bool) -> None:
    """Show the facts of a site."""
    import msgspec

    from edif_hpc.slurm.site import load_site

    path = site_file(ctx, which)
    found = msgspec.to_builtins(load_site(path), enc_hook=str) | {"file": str(path)}
    if found["engine"]["hub_token"] is not None:
        found["engine"]["hub_token"] = "(set)"  # noqa: S105 - instead of it
    if as_json:
        print_json(found)
        return
    gpus = found.pop("gpus")
    found["engine"] = {name: value for name, value in found["engine"].items() if value}
    facts(found)
    click.echo()
    columns = ("name", "partition", "gres", "max_walltime_min", "cpus", "mem_gb", "account", "qos")
    listing(({"name": name} | gpu for name, gpu in gpus.items()), columns, none="no GPUs")


def find_site(ctx: Context, which: str) -> Site:
    """A site by its name or its file.

    Raises:
        SettingsError: there is none, or its file is wrong.
    """
    from edif_hpc.slurm.site import load_site

    return load_site(site_file(ctx, which))


def site_file(ctx: Context, which: str) -> Path:
    """The file of a site, by its name or its path.

    Raises:
        SettingsError: there is none.
    """
    from edif_hpc.errors import SettingsError

    named = _folder(ctx) / f"{which}.toml"
    path = named if named.is_file() else Path(which).expanduser()
    if not path.is_file():
        known = ", ".join(each.stem for each in site_files(ctx)) or "none yet"
        raise SettingsError(
            f"there is no site {which!r}: no file of that name, and {_folder(ctx)} has {known}; make one on a login node: {_HELP}"
        )
    return path


def site_files(ctx: Context) -> list[Path]:
    """The files of all sites."""
    return sorted(_folder(ctx).glob("*.toml"))


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
