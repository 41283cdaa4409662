"""`edif-hpc request`: look after requests, one's own or, as an operator, everybody's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.context import Context, pass_context
from edif_hpc.cli.show import duration, facts, json_option, listing, moment, print_json
from edif_hpc.clock import SystemClock

COLUMNS = ("id", "state", "deployment", "owner", "attempt", "accepted", "ended", "failure")
ATTEMPTS = ("attempt", "node", "granted", "started", "ended", "how")


@click.group()
def request() -> None:
    """Look after requests."""


@request.command()
@click.option("--state", multiple=True, metavar="STATE", help="Only these; may be repeated.")
@click.option("--owner", metavar="TOKEN_ID", help="Only this token's (for operators).")
@click.option("--limit", type=click.IntRange(1, 1000), default=50, show_default=True)
@json_option
@pass_context
def ls(ctx: Context, /, *, as_json: bool, **filters: Any) -> None:
    """List requests, the newest first."""
    asked = {name: value for name, value in filters.items() if value}
    found = ctx.api().get("/api/requests", **asked)["requests"]
    if as_json:
        print_json(found)
    else:
        listing(map(_row, found), COLUMNS, none="no requests")


@request.command()
@click.argument("request_id", metavar="ID")
@json_option
@pass_context
def show(ctx: Context, /, *, request_id: str, as_json: bool) -> None:
    """Show one request."""
    found = ctx.api().get(_path(request_id))
    if as_json:
        print_json(found)
    else:
        row = _row(found)
        facts(
            {
                name: row[name]
                for name in ("id", "shown", "description", *COLUMNS[2:-1], "expires", "meta")
            }
        )


@request.command()
@click.argument("request_id", metavar="ID")
@json_option
@pass_context
def explain(ctx: Context, /, *, request_id: str, as_json: bool) -> None:
    """Say why a request is where it is, and what each attempt did."""
    found = ctx.api().get(f"{_path(request_id)}/explain")
    if as_json:
        print_json(found)
        return
    now = SystemClock().wall()
    waits = found["position"] > 0
    seen = {
        "state": found["state"],
        "why": found["why"],
        "accepted": _since(found["accepted_at"], now),
        "ended": moment(found["ended_at"]),
    }
    if waits:
        seen |= {
            "place in the queue": found["position"],
            "ahead": _ahead(**found["ahead"]),
            "expected start": _expected(found["start_in_s"]),
            "given up": moment(found["expires_at"]),
        }
    facts({name: value for name, value in seen.items() if value is not None})
    listing(map(_times, found["attempts"]), ATTEMPTS, none="no attempt has been made")


def _ahead(requests: int, people: int) -> str:
    whose = "1 person" if people == 1 else f"{people} people"
    return f"{requests} request{'' if requests == 1 else 's'} of {whose}"


@request.command()
@click.argument("request_id", metavar="ID")
@pass_context
def cancel(ctx: Context, /, *, request_id: str) -> None:
    """Cancel a request; one that has ended stays as it is."""
    ended = ctx.api().delete(_path(request_id))
    how = (ended["failure"] or {}).get("message", "its result stays")
    click.echo(f"{ended['id']} is {ended['state']}: {how}")


@request.command()
@click.argument("request_id", metavar="ID")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Else ID.pt.")
@click.option("--wait", is_flag=True, help="Wait until it has ended.")
@pass_context
def fetch(ctx: Context, /, *, request_id: str, out: Path | None, wait: bool) -> None:
    """Download a result to a file for torch.load.

    A download that was cut goes on where it stopped, also when the command is run again.
    """
    from edif_hpc.cli.fetch import result_of

    target = out or Path(f"{Path(request_id).name}.pt")
    file = result_of(ctx.api(), request_id, target, wait=wait)
    click.echo(f"wrote {file}")
    if file.suffix == ".zst":
        click.echo(
            f"it is compressed: zstd -d {file} (or: pip install zstandard, and fetch again)"
        )
    click.echo(f"load it: torch.load({str(target)!r}, map_location='cpu', weights_only=False)")


def _path(request_id: str) -> str:
    from edif_hpc.cli.api import part

    return f"/api/requests/{part(request_id)}"


def _row(found: dict[str, Any]) -> dict[str, Any]:
    failure = (found["failure"] or {}).get("kind")
    return _times(found) | {"failure": failure}


def _since(at: float, now: float) -> str:
    return f"{moment(at)} ({duration(max(0.0, now - at))} ago)"


def _expected(start_in_s: float | None) -> str:
    return "unknown" if start_in_s is None else f"in about {duration(start_in_s)}"


def _times(found: dict[str, Any]) -> dict[str, Any]:
    return found | {
        name.removesuffix("_at"): moment(value)
        for name, value in found.items()
        if name.endswith("_at")
    }
