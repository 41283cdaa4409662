"""`edif-hpc up --site NAME`: a deployment wanted at a cluster, and how it goes until the first worker is warm.

The relay orders, a launcher submits; this command only says what is wanted, and watches. What contradicts the site's file, or
what sbatch would not take, is refused before anything is written. Where no launcher has been heard of, the command does its
rounds while it waits (`rounds`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import click

from edif_hpc.cli.allocations.rounds import Rounds, has_sbatch
from edif_hpc.cli.allocations.targets import Line, add_if_new, deployed, processes, slot_of
from edif_hpc.cli.allocations.words import standing
from edif_hpc.cli.api import Api, part
from edif_hpc.cli.context import Context
from edif_hpc.cli.launcher import launcher_of
from edif_hpc.cli.show import Progress, duration
from edif_hpc.cli.sites.checks import must_be_taken
from edif_hpc.cli.watch import watch
from edif_hpc.errors import Conflict, LaunchError, NotFound, Unavailable
from edif_hpc.slurm.logs import tail
from edif_hpc.slurm.ordering import folder_of
from edif_hpc.slurm.site import Site

_LOOK_S: Final = 1.0
_LAST_WORDS: Final = 8


def raise_at(
    ctx: Context,
    target: str,
    where: str,
    asked: Mapping[str, Any],
    *,
    wait: bool,
    timeout_s: float | None,
) -> str:
    """Want it up at a site that has a file here, and watch; returns its name."""
    api, launcher, here = ctx.api(), launcher_of(ctx, where), has_sbatch(ctx)
    site = launcher.site
    known = deployed(api, target)
    body = wanted(site, known, asked)
    if here:
        gpus = body.get("gpus") or (known or {}).get("gpus") or 1
        must_be_taken(site, body["gpu"], gpus=gpus, walltime_min=body["walltime_min"])
    on_gpu = site.gpus[body["gpu"]].vendor != "none"
    usual = "cuda" if on_gpu else "cpu"
    name = _ask(api, target, site.name, body, device=asked.get("device"), usual=usual)
    click.echo(
        f"{name} is wanted at {site.name}: {body['gpu']}, {duration(60 * body['walltime_min'])} at a time"
    )
    rounds = Rounds(api, site.name, launcher if here else None, click.echo)
    _watch(Watching(api=api, name=name, rounds=rounds, place=site.name, site=site), wait, timeout_s)  # fmt: skip
    return name


def raise_from_afar(
    ctx: Context,
    target: str,
    place: str,
    asked: Mapping[str, Any],
    *,
    wait: bool,
    timeout_s: float | None,
) -> str:
    """Want it up at a site that has no file here, but a launcher that the relay knows; nothing can be checked. Returns its name."""
    api = ctx.api()
    body = {name: asked[name] for name in ("gpu", "gpus") if asked.get(name) is not None}
    if asked.get("replicas") is not None:
        body["slots"] = asked["replicas"]
    if asked.get("walltime_s") is not None:
        body["walltime_min"] = max(1, math.floor(asked["walltime_s"] / 60))
    usual = "cuda" if body.get("gpu") else "cpu"
    name = _ask(api, target, place, body, device=asked.get("device"), usual=usual)
    click.echo(
        f"{name} is wanted at {place}, whose file is not here: its launcher will see whether it can be"
    )
    rounds = Rounds(api, place, None, click.echo)
    _watch(Watching(api=api, name=name, rounds=rounds, place=place), wait, timeout_s)
    return name


def wanted(site: Site, known: Line | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """What to ask the relay for: the options, else what the deployment has, else what the site offers.

    Raises:
        click.UsageError: the site has nothing like it; it names what there is.
    """
    known = known if known is not None and known.get("site") == site.name else {}
    gpu = asked.get("gpu") or known.get("gpu")
    there = ", ".join(
        f"{name} (up to {duration(60 * facts.max_walltime_min)})"
        for name, facts in site.gpus.items()
    )
    if gpu is None and len(site.gpus) == 1:
        [gpu] = site.gpus
    if gpu is None:
        raise click.UsageError(
            f"the site {site.name} has several kinds of GPU; say which by --gpu: {there}"
        )
    if gpu not in site.gpus:
        raise click.UsageError(f"the site {site.name} has no GPU called {gpu!r}; it has: {there}")
    facts = {"gpu": gpu, "walltime_min": _walltime_min(site, gpu, known, asked)}
    more = {"gpus": asked.get("gpus"), "slots": asked.get("replicas")}
    return facts | {name: value for name, value in more.items() if value is not None}


def _walltime_min(site: Site, gpu: str, known: Line, asked: Mapping[str, Any]) -> int:
    most = site.gpus[gpu].max_walltime_min
    given_s: float | None = asked.get("walltime_s")
    if given_s is None:
        before: int | None = known.get("walltime_min")
        return min(most, before or most)
    if not 60 <= given_s <= 60 * most:
        raise click.UsageError(
            f"a walltime of {duration(given_s)} on {gpu} of {site.name}: from 1 min to {duration(60 * most)} are allowed there"
        )
    return math.floor(given_s / 60)


def _ask(
    api: Api,
    target: str,
    place: str,
    body: Mapping[str, Any],
    *,
    device: str | None,
    usual: str,
) -> str:
    """Tell the relay; returns the deployment's name.

    Raises:
        Conflict: it runs elsewhere, and its slots are full.
    """
    name = add_if_new(api, target, device=device, usual=usual)
    elsewhere = {e["site"] for e in processes(api, name) if e["state"] != "draining"} - {place}
    if elsewhere:
        raise Conflict(
            f"{name} runs at {', '.join(sorted(elsewhere))}; end it there first: edif-hpc down {name}"
        )
    api.post("/api/allocations", {"deployment": name, "site": place, **body})
    return name


def _watch(watching: Watching, wait: bool, timeout_s: float | None) -> None:  # noqa: FBT001 - as it came
    if not wait:
        click.echo("see how it goes: edif-hpc ps")
        watching.farewell()
        return
    try:
        watching.until_warm(timeout_s)
    except (KeyboardInterrupt, LaunchError):
        watching.farewell()
        raise
    watching.farewell()


@dataclass(kw_only=True)
class Watching:
    """One deployment that comes up at a place."""

    api: Api
    name: str
    rounds: Rounds
    place: str
    site: Site | None = None  #: its facts, where they are known
    _seen: set[str] = field(default_factory=set)

    def until_warm(self, timeout_s: float | None) -> None:
        """Show how it goes until a worker is warm.

        Raises:
            LaunchError: it was not in time, or the relay has given up.
        """
        progress = Progress()
        with self.rounds:
            for _ in watch(lambda: None, timeout_s=timeout_s, interval_s=_LOOK_S):
                try:
                    if self._look(progress):
                        progress.end()
                        return
                except Unavailable as error:  # a relay that is started anew comes back
                    progress.tell(str(error))
        progress.end()
        raise LaunchError(
            f"not warm within {duration(timeout_s or 0)}; it goes on, see: edif-hpc ps, edif-hpc explain {self.name}"
        )

    def farewell(self) -> None:
        """Say who goes on when this command has ended."""
        run = f"edif-hpc launcher run --site {self.place} (or from cron: edif-hpc launcher once)"
        if self.rounds.own and self.site is not None and self.site.compute_may_submit:
            click.echo(
                f"pilots submit their successors; to start again after a failure, and for changes, keep a launcher running: {run}"
            )
        elif self.rounds.own or self.rounds.heard() is None:
            click.echo(f"a launcher has to run for this to go on; on a login node: {run}")

    def _look(self, progress: Progress) -> bool:
        """One look, and what follows from it; whether a worker is warm."""
        lines = [e for e in processes(self.api, self.name) if e["site"] == self.place]
        slot = self._slot()
        self._report_ended(lines, progress)
        progress.tell(_all(lines) or f"{self.name}: {slot['why'] or 'is being ordered'}")
        if any(line["state"] == "warm" for line in lines):
            return True
        if slot["paused"] and not lines:
            progress.end()
            raise LaunchError(f"{self.name} does not come up: {slot['why']}")
        self.rounds.step(hurry=any(map(_untaken, lines)))
        return False

    def _slot(self) -> dict[str, Any]:
        """What was decided for the first slot; the relay looks at it every two seconds, before that there is nothing."""
        try:
            found: dict[str, Any] = self.api.get(f"/api/slots/{part(self.name)}/0")
        except NotFound as error:
            if "wants 0 replicas" in str(error):
                raise
            return {"paused": False, "why": ""}
        return found

    def _report_ended(self, lines: list[Line], progress: Progress) -> None:
        """The last words of those that ended before one was warm."""
        now = {line["name"] for line in lines}
        gone, self._seen = self._seen - now, now
        slots = {name.removeprefix(f"edif-{self.name}-").partition("-")[0] for name in gone}
        for slot in sorted(slots):
            known = self.api.get(f"/api/slots/{part(self.name)}/{slot}")["generations"]
            progress.end()
            for each in (each for each in known if each["name"] in gone):
                self._report_one(each)

    def _report_one(self, ended: dict[str, Any]) -> None:
        folder = None if self.site is None else folder_of(self.site, ended["name"])
        seen = [] if folder is None else tail(folder, _LAST_WORDS)
        for line in seen or str(ended["detail"]).splitlines()[-_LAST_WORDS:]:
            click.echo(f"  {line}", err=True)
        click.echo(f"{ended['name']} ended before it was warm: {ended['cause']}", err=True)


def _untaken(line: Line) -> bool:
    return line["state"] == "ordered" and not line.get("order_holder")


def _all(lines: list[Line]) -> str:
    return "; ".join(f"{slot_of(line)}: {standing(line)}" for line in lines)
