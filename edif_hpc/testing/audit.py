"""What a relay's books say after a storm: nothing lost, nothing doubled.

The relay has to be stopped: the audit opens its database and its folders itself, because what counts is what is on the disk.
For every accepted request there must be one terminal status, one charge, and one stored result if it completed (none if it
did not). Attempts beyond the first that started are re-executions: allowed after a lost worker, and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.domain.request import Request, RequestState
from edif_hpc.store.base import Attempt
from edif_hpc.store.sqlite import SqliteStore

_ALL = 1_000_000


@dataclass(kw_only=True)
class Audit:
    """The findings. `faults` has to be empty."""

    completed: int = 0
    errors: Counter[str] = field(default_factory=Counter)  #: ended with an error, by kind
    executions: int = 0
    reexecutions: int = 0
    lost_leases: Counter[str] = field(
        default_factory=Counter
    )  #: attempts that ended without an answer, by cause
    faults: list[str] = field(default_factory=list)
    states: dict[str, RequestState] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """How many were accepted."""
        return len(self.states)


def audit(
    data_dir: Path,
    *,
    told: Iterable[str] = (),
    right: Mapping[str, Callable[[bytes], bool]] | None = None,
) -> Audit:
    """Look at everything.

    Args:
        data_dir: a stopped relay's.
        told: ids that clients were told RECEIVED for; each has to be there.
        right: for some ids, whether bytes are the one right result.
    """
    store = SqliteStore(data_dir / "queue.sqlite")
    store.open()
    try:
        found = Audit()
        charges = Counter(charge.request_id for charge in store.charges())
        for request in store.requests(limit=_ALL):
            found.states[request.id] = request.state
            inline = store.inline_result(request.id)
            _count(found, request, store.attempts(request.id))
            found.faults += _faults(
                request, charges[request.id], inline, data_dir / "results" / "objects"
            )
        found.faults += [
            f"{each}: was RECEIVED, and is not in the store"
            for each in set(told) - set(found.states)
        ]
        found.faults += _wrong(store.get, store.inline_result, data_dir, right or {})
    finally:
        store.close()
    return found


def _count(found: Audit, request: Request, attempts: list[Attempt]) -> None:
    if request.failure is not None:
        found.errors[str(request.failure.kind)] += 1
    else:
        found.completed += request.state is RequestState.COMPLETED
    started = sum(each.started_at is not None for each in attempts)
    found.executions += started
    found.reexecutions += max(0, started - 1)
    found.lost_leases.update(each.end for each in attempts[:-1] if each.end is not None)


def _faults(request: Request, charges: int, inline: bytes | None, objects: Path) -> list[str]:
    if not request.terminal:
        return [f"{request.id}: never ended, it is {request.state}"]
    faults = []
    if charges != 1:
        faults.append(f"{request.id}: has {charges} charges")
    result, file = request.result, None
    if result is not None and result.key is not None:
        file = objects / result.key
        if not file.is_file() or file.stat().st_size != result.size_bytes:
            faults.append(f"{request.id}: its result {result.key} is not there whole")
    kept = [each for each in (objects / request.id).glob("*") if each != file]
    stored = (inline is not None) + (file is not None)
    if stored != (request.state is RequestState.COMPLETED) or (request.failure is None) is not (
        result is not None
    ):
        faults.append(f"{request.id}: {request.state} with {stored} stored results")
    if kept:
        faults.append(
            f"{request.id}: {len(kept)} stored results besides its own: {[each.name for each in kept]}"
        )
    return faults


def _wrong(
    get: Callable[[str], Request | None],
    inline: Callable[[str], bytes | None],
    data_dir: Path,
    right: Mapping[str, Callable[[bytes], bool]],
) -> list[str]:
    faults = []
    for request_id, is_right in right.items():
        request = get(request_id)
        if request is None or request.result is None:
            continue  # told by the other checks
        key = request.result.key
        stored = (
            inline(request_id)
            if key is None
            else (data_dir / "results" / "objects" / key).read_bytes()
        )
        if stored is None or not is_right(stored):
            faults.append(f"{request_id}: its stored result is not the right one")
    return faults
