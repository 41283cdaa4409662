"""What the relay knows of a slot, in words; and where its log is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edif_hpc.cli.allocations.logs import follow
from edif_hpc.cli.allocations.place import Folders
from edif_hpc.cli.allocations.targets import deployed, must_be_deployed, processes
from edif_hpc.cli.api import Api, part
from edif_hpc.cli.context import Context
from edif_hpc.cli.show import duration, moment
from edif_hpc.errors import InvalidInput, NotFound
from edif_hpc.slurm.logs import log_of, read_end

Slot = dict[str, Any]
SILENT_S = 180.0
_NAME = re.compile(r"edif-(.+)-(\d+)-\d+-[0-9a-f]+", re.ASCII)
_ENDED_SHOWN = 5


def slots(api: Api, target: str) -> list[Slot]:
    """What is known of one slot, or of all slots of a deployment."""
    name, slash, index = target.rpartition("/")
    if slash and index.isdecimal() and deployed(api, target) is None:
        return [api.get(f"/api/slots/{part(name)}/{index}")]
    known = must_be_deployed(api, target)
    name = known["name"]
    taken = {int(line["slot"]) for line in processes(api, name)}
    every = (_known(api, name, index) for index in sorted(taken | set(range(known["replicas"]))))
    found = [each for each in every if each is not None]
    if not found:
        raise NotFound(f"nothing is known of the slots of {name}; bring it up: edif-hpc up {name}")
    return found


def lines(slot: Slot) -> Iterator[str]:
    """One slot, for people."""
    yield f"{slot['deployment']}/{slot['slot']}: {slot['why'] or _quiet(slot)}"
    if slot["advice"]:
        yield f"  advice: {slot['advice']}"
    if slot["gap_s"]:
        yield f"  a gap of {duration(slot['gap_s'])} is to be expected at each end of a walltime"
    if slot["site"]:
        expected = slot["expected"]
        yield (
            f"  expected at {slot['site']}: {duration(expected['wait_s'])} in the queue, {duration(expected['warmup_s'])} to load; "
            f"a successor is ordered {duration(expected['lead_s'])} before an end"
        )
        yield f"  launcher: {_launcher(slot)}"
    if slot["excluded_nodes"]:
        yield f"  nodes left out: {', '.join(slot['excluded_nodes'])}"
    live = [each for each in slot["generations"] if each["ended_at"] is None]
    ended = [each for each in slot["generations"] if each["ended_at"] is not None]
    for each in [*ended[-_ENDED_SHOWN:], *live]:
        yield from _generation(each)


def found_log(ctx: Context, target: str, count: int) -> dict[str, Any]:
    """The last lines of a log, and where it is if it can be read here.

    Raises:
        NotFound: there is no such allocation, or nothing is known of what it said.
    """
    api, folders = ctx.api(), Folders(ctx)
    name, site, last_words = _allocation(api, target)
    log = log_of(folders.of(site, name))
    said, read = (last_words.splitlines()[-count:], 0) if log is None else read_end(log, count)
    if log is None and not said:
        raise NotFound(f"the log of {name} is not seen from here, and it has not ended; look where the site {site} has its state_dir")  # fmt: skip
    return {"name": name, "site": site, "log": log and str(log), "lines": said, "read": read}


def follow_log(found: dict[str, Any]) -> None:
    """Show what is added to it, until interrupted."""
    if found["log"] is None:
        raise InvalidInput(f"{found['name']} cannot be followed: its log is not seen from here")
    for added in follow(Path(found["log"]), found["read"]):
        click.echo(added, nl=False)


def _known(api: Api, name: str, index: int) -> Slot | None:
    try:
        found: Slot = api.get(f"/api/slots/{part(name)}/{index}")
    except NotFound:
        return None
    return found


def _allocation(api: Api, target: str) -> tuple[str, str, str]:
    """Name, site and last words of the allocation that is meant; of a deployment it is the newest that has begun."""
    line = next((e for e in processes(api) if target in (e["name"], e["allocation"])), None)
    if line is not None:
        return line["name"], line["site"], ""
    known = deployed(api, target)
    found = slots(api, known["name"]) if known is not None else _slot_of(api, target)
    every = [(slot["site"] or "local", each) for slot in found for each in slot["generations"]]
    meant = [each for each in every if known is not None or each[1]["name"] == target]
    if not meant:
        raise NotFound(f"there is no allocation or deployment {target!r}; see: edif-hpc ps")
    site, each = max(meant, key=lambda e: (e[1]["started_at"] is not None, e[1]["submitted_at"]))
    return each["name"], site, each["detail"] if each["ended_at"] is not None else ""


def _slot_of(api: Api, name: str) -> list[Slot]:
    """The slot that the name of an allocation tells: edif-DEPLOYMENT-SLOT-GENERATION-ID."""
    match = _NAME.fullmatch(name)
    found = _known(api, match[1], int(match[2])) if match is not None else None
    return [] if found is None else [found]


def _quiet(slot: Slot) -> str:
    if not slot["up"]:
        return "nobody wants it up; edif-hpc up"
    return (
        "nothing was decided yet"
        if slot["site"]
        else "of this machine: the relay does not fill it"
    )


def _launcher(slot: Slot) -> str:
    heard = slot["launcher"]
    if heard is None:
        return (
            f"none was heard of since the relay began; edif-hpc launcher run --site {slot['site']}"
        )
    late = f": start it again, edif-hpc launcher run --site {slot['site']}" if heard["silent_s"] > SILENT_S else ""  # fmt: skip
    return f"{heard['name']}, heard {duration(heard['silent_s'])} ago{late}"


def _generation(each: dict[str, Any]) -> Iterator[str]:
    job = f", job {each['job_id']}" if each["job_id"] else ""
    node = f" on {each['node']}" if each["node"] else ""
    if each["ended_at"] is not None:
        served = "" if each["warm_at"] is None else f", was warm for {duration(each['ended_at'] - each['warm_at'])}"  # fmt: skip
        yield f"  generation {each['generation']}{job}{node}: ended {moment(each['ended_at'])} ({each['cause']}){served}"
        if each["warm_at"] is None and each["detail"]:
            yield from (f"    {line}" for line in str(each["detail"]).splitlines()[-3:])
        return
    left = "" if each["left_s"] is None else f", {duration(each['left_s'])} left"
    reason = f" ({each['reason']})" if each["reason"] else ""
    yield f"  generation {each['generation']}{job}{node}: {each['state']}{reason}{left}"
    if each["advice"]:
        yield f"    {each['advice']}"
