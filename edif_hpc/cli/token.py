"""`edif-hpc token`: who may use the relay."""

from __future__ import annotations

from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.limits import given, limit_options, said, shown, told
from edif_hpc.cli.params import Duration
from edif_hpc.cli.show import json_option, listing, moment, print_json
from edif_hpc.errors import NotFound

COLUMNS = ("id", "name", "role", "created", "expires", "revoked", "limits")


@click.group()
def token() -> None:
    """Who may use the relay."""


@token.command()
@click.argument("name")
@click.option("--operator", is_flag=True, help="The same as --role operator.")
@click.option(
    "--role",
    type=click.Choice(["researcher", "operator", "launcher"]),
    default="researcher",
    show_default=True,
    help="A launcher's may only fetch orders and report on a site's jobs.",
)
@click.option("--expires", "expires_in_s", type=Duration(), help="For how long, as 90d.")
@click.option("--queue", "queue_s", type=Duration(), help="How long requests may wait.")
@click.option("--keep", is_flag=True, help="Queued requests outlive their client.")
@limit_options
@json_option
@pass_context
def create(ctx: Context, /, *, operator: bool, role: str, as_json: bool, **options: Any) -> None:
    """Make a token for NAME; it is shown once."""
    role = "operator" if operator else role
    api = ctx.api()
    limits = said(options)
    body = {"role": role, **options} | ({"limits": limits} if limits else {})
    made = api.post("/api/tokens", body)
    if as_json:
        print_json(made)
    else:
        names = (
            ("EDIF_RELAY", "EDIF_TOKEN") if role == "launcher" else ("NDIF_HOST", "NDIF_API_KEY")
        )
        click.echo(f"export {names[0]}={api.url} {names[1]}={made['token']}")
        click.echo(
            f"(a {role}'s token for {made['name']}, id {made['id']}; it is not shown again)",
            err=True,
        )


@token.command()
@json_option
@pass_context
def ls(ctx: Context, /, *, as_json: bool) -> None:
    """List the tokens, without their secrets."""
    found = ctx.api().get("/api/tokens")["tokens"]
    if as_json:
        print_json(found)
    else:
        listing(map(_row, found), COLUMNS, none="no tokens")


@token.command(name="set")
@click.argument("token_id", metavar="ID")
@limit_options
@json_option
@pass_context
def change(ctx: Context, /, *, token_id: str, as_json: bool, **options: Any) -> None:
    """Change what the requests of a token may use, from now on; `none` takes a limit back."""
    from edif_hpc.cli.api import part

    changed = ctx.api().post(f"/api/tokens/{part(token_id)}/limits", given(said(options)))
    if as_json:
        print_json(changed)
    else:
        click.echo(f"limits of {changed['name']}: {shown(changed['limits']) or 'none'}")


@token.command()
@click.option("--deployment", help="Only of this deployment.")
@json_option
@pass_context
def limits(ctx: Context, /, *, deployment: str | None, as_json: bool) -> None:
    """What your own requests may use, for each deployment, and who says so."""
    found = ctx.api().get("/api/limits")["deployments"]
    if deployment is not None:
        if deployment not in found:
            raise NotFound(
                f"there is no deployment {deployment!r}; deployed: {', '.join(found) or 'nothing yet'}"
            )
        found = {deployment: found[deployment]}
    if as_json:
        print_json(found)
        return
    rows = [
        {"deployment": name, "limit": flag.removeprefix("--max-"), **each}
        for name, of in found.items()
        for flag, each in told(of["limits"])
    ]
    listing(rows, ("deployment", "limit", "value", "set_by"), none="nothing is deployed")


@token.command()
@click.argument("token_id", metavar="ID")
@pass_context
def revoke(ctx: Context, /, *, token_id: str) -> None:
    """Revoke a token; its requests stay."""
    from edif_hpc.cli.api import part

    revoked = ctx.api().delete(f"/api/tokens/{part(token_id)}")
    click.echo(f"revoked {revoked['id']} ({revoked['name']})")


def _row(found: dict[str, Any]) -> dict[str, Any]:
    return (
        found
        | {"limits": shown(found.get("limits", {}))}
        | {each: moment(found[f"{each}_at"]) for each in ("created", "expires", "revoked")}
    )
