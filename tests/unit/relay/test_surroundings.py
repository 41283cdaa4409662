"""What `edif-hpc env` is told of where requests run."""

from __future__ import annotations

from typing import Any

from edif_hpc.domain.allocation import Peer, PeerRole
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.levels import Level, told
from edif_hpc.relay.seats import Worker
from edif_hpc.relay.surroundings import surroundings

TINY = Deployment(name="tiny", repo_id="edif/tiny", revision=None, task="text-generation")


def worker(slot: int, *, state: str = "warm", heard_at: float = 1.0, **facts: Any) -> Worker:
    peer = Peer(
        key="k" * 40, role=PeerRole.WORKER, allocation="a1", deployment="tiny", slot=slot, generation=1, created_at=0.0,
    )  # fmt: skip
    said = {"isolation": "full", "packages": {"torch": "2.13.0"}, "stores": ["/data"]} | facts
    return Worker(peer=peer, nonce="n", state=state, heard_at=heard_at, since=1.0, facts=said)


def entry(*workers: Worker) -> dict[str, Any]:
    [found] = surroundings([TINY], workers)
    return found


def test_without_a_warm_worker_little_is_known() -> None:
    found = entry(worker(0, state="loading"))
    assert (found["workers"], found["isolation"], found["rules"]) == (0, None, [])
    assert (found["packages"], found["stores"], found["dtype"]) == ({}, [], "float32")
    assert found["attention"] == ["eager", "sdpa"]


def test_the_newest_worker_speaks() -> None:
    found = entry(worker(0, heard_at=2.0, dtype="bfloat16"), worker(1, stores=["/old"]))
    assert (found["workers"], found["stores"], found["dtype"]) == (2, ["/data"], "bfloat16")
    assert found["rules"] == told(Level.FULL)


def test_the_weakest_level_counts() -> None:
    """A request may come to any of them."""
    found = entry(worker(0, heard_at=2.0), worker(1, isolation="no-namespaces"))
    assert found["isolation"] == "no-namespaces"
    assert found["rules"] == told(Level.NO_NAMESPACES)


def test_a_level_that_is_not_known_counts_as_the_weakest() -> None:
    """Workers say what they like."""
    assert entry(worker(0, isolation=["x"]), worker(1))["isolation"] == "process"


def test_workers_of_others_do_not_speak() -> None:
    other = Deployment(name="other", repo_id="edif/other", revision=None, task="text-generation")
    assert [each["workers"] for each in surroundings([TINY, other], [worker(0)])] == [1, 0]
