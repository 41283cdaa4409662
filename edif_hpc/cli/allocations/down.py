"""`edif-hpc down`: workers finish what runs and leave, jobs that wait are cancelled, and nothing takes their place."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack

import click

from edif_hpc.cli.allocations.local import SITE, runs_here
from edif_hpc.cli.allocations.rounds import Rounds
from edif_hpc.cli.allocations.targets import Line, must_be_deployed, processes
from edif_hpc.cli.api import Api
from edif_hpc.cli.context import Context
from edif_hpc.cli.show import Progress, duration
from edif_hpc.cli.watch import watch
from edif_hpc.errors import LaunchError


def bring_down(
    ctx: Context, targets: Iterable[str], *, wait: bool, timeout_s: float | None
) -> list[str]:
    """Drain deployments, or everything if none is named; returns the allocations that were there."""
    api = ctx.api()
    names = [must_be_deployed(api, target)["name"] for target in targets]
    before = [line for line in processes(api) if not names or line["deployment"] in names]
    asked = [{"deployment": name} for name in names] or [{}]
    count = sum(api.post("/api/drain", each)["allocations"] for each in asked)
    click.echo(f"{count} allocation(s) drain" if count else "nothing to drain")
    if wait and before:
        with ExitStack() as stack:
            sites = {line["site"] for line in before if _in_a_queue(line)}
            rounds = {
                site: stack.enter_context(Rounds.of(ctx, api, site, click.echo)) for site in sites
            }
            _until_gone(api, before, rounds, timeout_s)
    return [str(line["name"]) for line in before]


def _until_gone(
    api: Api, before: list[Line], rounds: dict[str, Rounds], timeout_s: float | None
) -> None:
    progress = Progress()
    left = before
    names = {line["name"] for line in before}
    for lines in watch(lambda: processes(api), timeout_s=timeout_s):
        listed = {line["name"]: line for line in lines if line["name"] in names}
        left = [*listed.values()]
        left += [line for line in before if line["name"] not in listed and runs_here(line)]
        if not left:
            progress.end()
            click.echo("gone")
            return
        progress.tell("still there: " + "; ".join(map(_remaining, left)))
        for site in {line["site"] for line in left if _in_a_queue(line)} & rounds.keys():
            rounds[site].step(hurry=True)
    progress.end()
    raise LaunchError(
        f"not gone within {duration(timeout_s or 0)}: {'; '.join(map(_remaining, left))}"
    )


def _in_a_queue(line: Line) -> bool:
    """Whether a launcher has to cancel its job."""
    return line["site"] != SITE and line["state"] in {"ordered", "submitted"}


def _remaining(line: Line) -> str:
    running = (line["worker"] or {}).get("running", 0)
    doing = f"runs {running} request(s)" if running else line["state"]
    return f"{line['name']} on {line['node'] or line['site']} (job {line['job_id']}) {doing}"
