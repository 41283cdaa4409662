"""`edif-hpc status`: the relay at a glance."""

from __future__ import annotations

from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.show import json_option, listing, print_json

COLUMNS = ("replica", "repo_id", "task", "state", "isolation", "why")


@click.command()
@json_option
@pass_context
def status(ctx: Context, /, *, as_json: bool) -> None:
    """The relay at a glance.

    A researcher's token sees what is served; an operator's also the requests.
    """
    found = _look(ctx)
    if as_json:
        print_json(found)
        return
    served = found["deployments"]
    rows = [
        each | {"replica": name, "state": each["application_state"]}
        for name, each in served.items()
    ]
    listing(rows, COLUMNS, none="nothing is deployed")
    if "requests" in found:
        counts = ", ".join(
            f"{count} {state.lower()}" for state, count in found["requests"].items()
        )
        click.echo(f"requests: {counts}; connected clients: {found['sessions']}")


def _look(ctx: Context) -> dict[str, Any]:
    from edif_hpc.errors import NotPermitted

    api = ctx.api()
    found: dict[str, Any]
    try:
        found = api.get("/api/status")
    except NotPermitted:
        found = api.open("/status").json()
    return found
