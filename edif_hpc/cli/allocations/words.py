"""Lines of `ps` in words: what an allocation does, what it waits for, and who follows it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from edif_hpc.cli.allocations.targets import Line, slot_of
from edif_hpc.cli.show import duration
from edif_hpc.clock import SystemClock
from edif_hpc.domain.deployment import ON_DEVICES


def state(line: Line) -> str:
    """Where it is: by its worker if that is connected."""
    return str((line["worker"] or {}).get("state", line["state"]))


def doing(line: Line) -> str:
    """What it does now, or waits for."""
    match line["state"]:
        case "ordered":
            holder = line.get("order_holder")
            who = "edif-hpc up" if line["site"] == "local" else "a launcher"
            return f"is being submitted by {holder}" if holder else f"waits for {who}"
        case "submitted":
            return waiting(line)
        case _:
            return _detail(line)


def _detail(line: Line) -> str:
    progress = (line["worker"] or {}).get("progress")
    detail = str(line["detail"])
    return f"{detail} {progress:.0%}".strip() if progress is not None else detail


def waiting(line: Line) -> str:
    """Why a scheduler lets it wait, and when it may start."""
    if line["site"] == "local":
        return str(line["detail"])
    reason, start_in_s = line.get("reason"), line.get("start_in_s")
    start = "" if start_in_s is None else f"may start in {duration(start_in_s)}"
    return ", ".join(part for part in (f"({reason})" if reason else "", start) if part)


def standing(line: Line) -> str:
    """Its state and all that belongs to it."""
    node = f" on {line['node']}" if line["node"] else ""
    match line["state"]:
        case "ordered":
            return f"ordered, {doing(line)}"
        case "submitted":
            said = waiting(line)
            return f"submitted as job {line['job_id']}{f', pending {said}' if said else ''}"
        case _:
            said = doing(line)
            more = f" ({said})" if said and said != state(line) else ""
            return f"{state(line)}{more}{node}"


def successor(line: Line, by_name: dict[str, Line]) -> str | None:
    """Who follows it, or when somebody will be ordered to."""
    name, due_s = line.get("successor"), line.get("successor_due_s")
    if name is not None:
        follower = by_name.get(name)
        return f"{state(follower)} {doing(follower)}".strip() if follower else name
    return None if due_s is None else f"ordered in {duration(due_s)}"


def _isolation(worker: dict[str, Any]) -> str | None:
    """The level, how executors have the weights on a device, and whether that has been tried on such a one."""
    level, weights = worker.get("isolation"), worker.get("weights")
    if not level:
        return None
    words = [level, *([weights] if weights in ON_DEVICES else [])]
    return ", ".join([*words, *(["unverified"] if worker.get("unverified") else [])])


def rows(lines: Iterable[Line]) -> Iterator[dict[str, Any]]:
    """The lines of `ps` as people read them."""
    now, found = SystemClock().wall(), list(lines)
    by_name = {line["name"]: line for line in found}
    for line in found:
        worker, left_s = line["worker"] or {}, line.get("left_s")
        yield line | {
            "slot": slot_of(line),
            "state": state(line),
            "detail": doing(line),
            "isolation": _isolation(worker),
            "leases": worker.get("leases", 0),
            "since": duration(max(0.0, now - (line["warm_at"] or line["submitted_at"]))),
            "left": None if left_s is None else duration(left_s),
            "successor": successor(line, by_name),
        }
