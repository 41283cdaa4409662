"""What serves a deployment, and the words for those who wait for it."""

from __future__ import annotations

from typing import Any

from edif_hpc.domain.allocation import Allocation, AllocationState, Peer, PeerRole
from edif_hpc.domain.request import Provision
from edif_hpc.relay.jobs import JobLine, Jobs
from edif_hpc.relay.provisioning import last_loads, provision
from edif_hpc.relay.seats import Worker
from edif_hpc.store.memory import MemoryStore

NOW, WALL = 1000.0, 5000.0
A = AllocationState


def allocation(state: AllocationState, **facts: Any) -> Allocation:
    values: dict[str, Any] = {
        "id": "a1", "deployment": "tiny", "slot": 0, "generation": 1, "site": "local", "submitted_at": WALL - 40,
    }  # fmt: skip
    return Allocation(state=state, **values | facts)


def worker(state: str, **facts: Any) -> Worker:
    peer = Peer(
        key="k" * 40, role=PeerRole.WORKER, allocation="a1", deployment="tiny", slot=0, generation=1, created_at=0.0,
    )  # fmt: skip
    return Worker(peer=peer, nonce="n", state=state, heard_at=NOW, since=NOW - 12, **facts)


def look(
    *,
    workers: tuple[Worker, ...] = (),
    allocations: tuple[Allocation, ...] = (),
    jobs: Jobs | None = None,
) -> tuple[Provision, str]:
    return provision(
        "tiny",
        workers=workers,
        allocations=allocations,
        jobs=jobs or Jobs(),
        last_load_s=41.0,
        now=NOW,
        wall=WALL,
    )


def test_nothing_is_ordered() -> None:
    other = allocation(A.WARM, deployment="other")
    assert look(allocations=(other,)) == (
        Provision.NONE,
        "no worker is ordered; an operator starts one: edif-hpc up tiny",
    )


def test_the_last_one_leaves() -> None:
    draining = worker("draining", draining=True)
    found = look(workers=(draining,), allocations=(allocation(A.DRAINING),))
    assert found[0] is Provision.NONE
    assert found[1].startswith("the last worker leaves")


def test_an_allocation_that_waits_says_what_its_launcher_told() -> None:
    waiting = allocation(A.SUBMITTED, job_id="77", detail="QOSMaxJobs")
    assert look(allocations=(waiting,)) == (
        Provision.PENDING,
        "the worker waits for a node: job 77 is queued for 40 s (QOSMaxJobs)",
    )


def test_an_allocation_that_runs_counts_more_than_one_that_waits() -> None:
    started = allocation(A.STARTED, id="a2", node="n1")
    found = look(allocations=(allocation(A.SUBMITTED), started))
    assert found == (Provision.LOADING, "the worker starts on n1")


def test_a_worker_that_loads() -> None:
    loading = worker("loading", detail="placing", done=1 << 20, total=4 << 20)
    assert look(workers=(loading,), allocations=(allocation(A.LOADING),)) == (
        Provision.LOADING,
        "the worker places the weights: 1.0 MiB of 4.0 MiB (25%), 12 s of about 41 s",
    )


def test_a_worker_that_failed_shows_nothing_of_its_machine() -> None:
    failed = worker("failed", detail="cannot have '/secret/place'")
    words = look(workers=(failed,))[1]
    assert "/secret" not in words
    assert "edif-hpc ps" in words


def test_one_warm_worker_is_enough() -> None:
    assert look(workers=(worker("loading"), worker("warm"))) == (Provision.WARM, "")


def test_the_last_load_is_read_from_the_rows() -> None:
    store = MemoryStore()
    store.open()
    with store.transaction():
        store.add_allocation(allocation(A.SUBMITTED), "hash")
        for state, at in ((A.STARTED, 10.0), (A.LOADING, 15.0), (A.WARM, 40.0), (A.ENDED, 90.0)):
            store.change_allocation("a1", at, state=state)
        store.add_allocation(allocation(A.SUBMITTED, id="a2", generation=2), "hash2")
    assert last_loads(store) == {"tiny": 25.0}


def test_the_schedulers_reason_and_estimate() -> None:
    waiting, jobs = allocation(A.SUBMITTED, job_id="77"), Jobs()
    told = JobLine(
        name=waiting.name, job_id="77", state="PENDING", reason="Resources", start_in_s=300
    )
    jobs.listed([waiting], "login1", [told], NOW)
    assert look(allocations=(waiting,), jobs=jobs)[1] == (
        "the worker waits for a node: job 77 is queued for 40 s (Resources), may start in about 5 min"
    )
