"""The command line `edif-hpc`: one file per noun, each command a parse, a call and a show.

It talks to a relay over HTTP with a token, so it works from a laptop, a login node or the relay's own host. Every error
is one line on stderr that says what was observed and the way out, with an exit code of `exits.Exit`; a traceback is shown
only on request.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.context import Context
from edif_hpc.cli.exits import Exit, exit_code
from edif_hpc.cli.lazy import Entry, LazyGroup
from edif_hpc.cli.show import plainly
from edif_hpc.errors import EdifError

ENTRIES = {
    "relay": Entry(place="edif_hpc.cli.relay:relay", summary="Make and run a relay."),
    "deployment": Entry(
        place="edif_hpc.cli.deployment:deployment", summary="What the relay is to serve."
    ),
    "hub": Entry(place="edif_hpc.cli.hub:hub", summary="Give clients the small files of a model."),
    "up": Entry(
        place="edif_hpc.cli.fleet:up", summary="Start workers for the free slots of a deployment."
    ),
    "down": Entry(
        place="edif_hpc.cli.fleet:down",
        summary="End workers: they finish what runs, leave, and are not replaced.",
    ),
    "scale": Entry(
        place="edif_hpc.cli.fleet:scale", summary="Change how many workers a deployment has."
    ),
    "drain": Entry(
        place="edif_hpc.cli.fleet:drain",
        summary="Have allocations replaced: they finish what runs, and leave.",
    ),
    "ps": Entry(
        place="edif_hpc.cli.fleet:ps",
        summary="List the allocations: their workers, what they do or wait for, and who follows.",
    ),
    "explain": Entry(
        place="edif_hpc.cli.slots:explain",
        summary="Tell why a deployment's slots are as they are.",
    ),
    "logs": Entry(
        place="edif_hpc.cli.slots:logs",
        summary="Show the log of a deployment's newest allocation, or of the one that is named.",
    ),
    "site": Entry(place="edif_hpc.cli.site:site", summary="The facts of a cluster."),
    "launcher": Entry(
        place="edif_hpc.cli.launcher:launcher",
        summary="Carry out the relay's orders at a site's scheduler.",
    ),
    "request": Entry(place="edif_hpc.cli.request:request", summary="Look after requests."),
    "token": Entry(place="edif_hpc.cli.token:token", summary="Who may use the relay."),
    "status": Entry(place="edif_hpc.cli.status:status", summary="The relay at a glance."),
    "env": Entry(
        place="edif_hpc.cli.env:env",
        summary="What a request finds where it runs, and what it may do there.",
    ),
    "doctor": Entry(
        place="edif_hpc.cli.doctor:doctor", summary="Check this machine and its relay."
    ),
    "demo": Entry(place="edif_hpc.cli.demo:demo", summary="Try all of it on this machine."),
}


class Ended(click.ClickException):
    """A command that ended with an error: one line and an exit code."""

    def __init__(self, message: str, code: Exit) -> None:
        super().__init__(message)
        self.code = code


class Root(LazyGroup):
    """The root group: it turns whatever ends a command into one line and an exit code."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line; outside tests it does not return."""
        extra = {"prog_name": "edif-hpc", **extra}
        standalone = extra.pop("standalone_mode", True)
        run = functools.partial(super().main, *args, standalone_mode=False, **extra)
        with plainly():
            return sys.exit(_ended(run)) if standalone else run()

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit, BrokenPipeError):
            raise
        except EdifError as error:
            raise Ended(str(error), exit_code(error)) from error
        except Exception as error:
            if ctx.params["traceback"]:
                raise
            seen = f"unexpected {type(error).__name__}: {error}"
            hint = "run edif-hpc --traceback ... and report what it shows"
            raise Ended(f"{seen}; {hint}", Exit.FAILED) from error


def _ended(run: Callable[[], Any]) -> int:
    """Run, and say in one line what went wrong."""
    try:
        code = run()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return Exit.USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "edif-hpc"
        _say(f"{error.format_message()} (see {path} --help)")
        return Exit.USAGE
    except Ended as error:
        _say(error.format_message())
        return error.code
    except click.ClickException as error:
        _say(error.format_message())
        return Exit.FAILED
    except click.Abort:
        _say("interrupted")
        return Exit.INTERRUPTED
    return code if isinstance(code, int) else Exit.OK


def _say(message: str) -> None:
    click.echo(f"edif-hpc: {' '.join(message.split())}", err=True)


@click.group(
    "edif-hpc", cls=Root, entries=ENTRIES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option("--relay", metavar="URL", help="The relay to talk to; or set EDIF_RELAY.")
@click.option(
    "--config",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The settings file; or set EDIF_CONFIG.",
)
@click.option("--traceback", is_flag=True, help="Show the traceback of an unexpected error.")
@click.version_option(package_name="edif-hpc")
@click.pass_context
def main(ctx: click.Context, /, *, relay: str | None, config: Path | None, **_: bool) -> None:
    """Serve nnsight requests from time-limited allocations.

    The token comes from EDIF_TOKEN or from the settings file, never from the command line, where other users of this
    machine could read it.
    """
    environ = dict(os.environ)  # noqa: TID251 - this is the process main
    ctx.obj = Context(environ=environ, config=config, relay=relay)


if __name__ == "__main__":
    main()
