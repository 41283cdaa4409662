"""`edif-hpc relay`: make a relay on this machine, and run it."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The settings that most relays differ in; all others are in the settings file or environment."""
    for option in (
        click.option("--worker-bind", metavar="ENDPOINT", help="Where workers connect to."),
        click.option(
            "--public-url", metavar="URL", help="The relay's address as researchers write it."
        ),
        click.option("--port", type=int, help="Port of HTTP; 0 takes a free one."),
        click.option("--host", help="Address that HTTP binds to."),
        click.option(
            "--data-dir",
            type=click.Path(file_okay=False, path_type=Path),
            help="The relay's folder.",
        ),
    ):
        command = option(command)
    return command


@click.group()
def relay() -> None:
    """Make and run a relay."""


@relay.command()
@click.option("--name", default=getpass.getuser, help="Your name on the first operator token.")
@_settings_options
@pass_context
def init(ctx: Context, /, *, name: str, **flags: Any) -> None:
    """Make the relay's folder, its keys and the first operator token.

    The token and the address go into the settings file, readable by you alone, if it has no [client] table yet.
    """
    from edif_hpc.cli.founding import found

    for line in found(ctx, operator_name=name, flags=flags):
        click.echo(line)


@relay.command()
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@_settings_options
@pass_context
def serve(ctx: Context, /, **flags: Any) -> None:
    """Run the relay until SIGTERM or Ctrl-C.

    Requests that wait, and workers, outlive it: start it again and they go on.
    """
    from edif_hpc.cli.founding import relay_app

    relay_app().serve(ctx.relay_settings(flags))
