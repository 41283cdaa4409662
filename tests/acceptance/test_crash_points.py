"""Every named crash point, with a real SIGKILL: nothing that was accepted is lost, nothing happens twice.

The points and what they stand for are `failpoints.KNOWN`. For each, the process that owns it kills itself there; the relay
is then started again by the test, the worker by its pilot. Clients are what they are in life: one listens, some poll, and who
has not heard RECEIVED sends again. Afterwards the relay is stopped and its books are read from the disk.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from edif_hpc.failpoints import KNOWN
from edif_hpc.testing.audit import Audit, audit
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.raw_client import RawClient
from edif_hpc.testing.stack import Stack
from edif_hpc.testing.wait import wait_until

pytestmark = pytest.mark.slow

WORKER = sorted(name for name in KNOWN if name.startswith("worker."))
RELAY = sorted(name for name in KNOWN if name.startswith(("store.", "relay.")))
#: Blobs above 64 KiB lie in files, results above 1 MiB go up in parts; both kinds are in every storm.
TASKS = [
    Task(name="small"),
    Task(name="large result", result_bytes=2 << 20),
    Task(name="large blob", padding="x" * 100_000),
    Task(name="small again", log="a line"),
    Task(name="slow", seconds=0.05),
]


def times(point: str) -> tuple[int, ...]:
    """At which hits to die: each storm commits often, sends five grants, and has one large blob."""
    room = point.partition(".")[2].partition(".")[0]
    return {"blob": (1,), "send": (1, 3)}.get(room, (1, 3, 6))


@pytest.fixture(scope="module")
def crashing(noop_stack: Stack) -> tuple[Stack, RawClient]:
    return noop_stack, noop_stack.client()


def storm(client: RawClient, case: str) -> Mapping[str, bytes]:
    """Send all tasks at once and wait for their ends; returns the one right result of each id that ended well."""
    blobs = [
        Task(**(task_fields(each) | {"name": f"{case} {each.name}"})).blob() for each in TASKS
    ]
    with ThreadPoolExecutor(len(blobs)) as pool:
        ids = list(pool.map(lambda blob: sent(client, blob), blobs))
        ends = list(pool.map(client.ended, ids))
    for blob, end in zip(blobs, ends, strict=True):
        assert end.status == "COMPLETED", end
        assert patiently(client, end.id) == result_of(blob)
    return {request_id: result_of(blob) for request_id, blob in zip(ids, blobs, strict=True)}


def task_fields(task: Task) -> dict[str, object]:
    return {name: getattr(task, name) for name in task.__struct_fields__}


def sent(client: RawClient, blob: bytes) -> str:
    """Send until RECEIVED has been heard."""

    def attempt() -> str | None:
        try:
            return client.send(blob)
        except httpx.TransportError:
            return None

    return wait_until(attempt, 60, "the relay says RECEIVED") or ""


def patiently(client: RawClient, request_id: str) -> bytes:
    """Fetch a result, although the relay may die meanwhile."""

    def attempt() -> bytes | None:
        try:
            return client.result(client.ended(request_id))
        except httpx.TransportError:
            return None

    return wait_until(attempt, 60, "the result is fetched") or b""


def settled(stack: Stack, results: Mapping[str, bytes]) -> Audit:
    """Wait for what no client knows of, stop the relay, and read the books."""
    wait_until(lambda: stack.operator.unfinished() == 0, 60, "everything accepted has ended")
    assert stack.stop_relay() == 0
    found = audit(
        stack.data_dir, told=results, right={each: right.__eq__ for each, right in results.items()}
    )
    assert found.faults == []
    assert not found.errors
    return found


@pytest.mark.parametrize(
    ("point", "nth"), [(point, nth) for point in RELAY for nth in times(point)]
)
def test_the_relay_dies_here(crashing: tuple[Stack, RawClient], point: str, nth: int) -> None:
    stack, client = crashing
    if not stack.allocations:
        stack.launch(engine="noop")
        stack.wait_warm()
    stack.stop_relay()
    stack.spawn_relay(failpoints=f"{point}=kill@{nth}")
    with ThreadPoolExecutor(1) as pool:
        results = pool.submit(storm, client, f"{point}@{nth}")
        wait_until(lambda: stack.relay_ended() is not None or results.done(), 60, "the relay dies")
        assert stack.relay_ended() == -signal.SIGKILL, (
            f"the storm never came to {point} for the {nth}. time"
        )
        stack.start_relay()
        right = results.result(120)
    settled(stack, right)


@pytest.mark.parametrize("point", WORKER)
def test_the_worker_dies_here(crashing: tuple[Stack, RawClient], point: str) -> None:
    """The fourth time: its pilot starts it again with the same order, and then less than four are left to run."""
    stack, client = crashing
    if stack.relay is None:
        stack.start_relay()
    stack.drain()
    [allocation] = stack.launch(engine="noop", failpoints=f"{point}=kill@4")
    stack.wait_warm()
    [before] = stack.processes("worker")
    right = storm(client, point)
    wait_until(
        lambda: [each.pid for each in stack.processes("worker")] not in ([], [before.pid]),
        60,
        "the pilot starts it again",
    )
    assert "code=-9" in allocation.log
    settled(stack, right)
