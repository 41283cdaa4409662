"""What nnsight and scripts are told of the fleet."""

from __future__ import annotations

from typing import Any

from edif_hpc.domain.allocation import Peer, PeerRole
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.request import Provision
from edif_hpc.relay.reports import nnsight_status
from edif_hpc.relay.seats import Worker

TINY = Deployment(
    name="tiny",
    repo_id="edif/tiny",
    revision=None,
    task="text-generation",
    more_tasks=("feature-extraction",),
)


def worker(slot: int, state: str) -> Worker:
    peer = Peer(
        key="k" * 40, role=PeerRole.WORKER, allocation="a1", deployment="tiny", slot=slot, generation=1, created_at=0.0,
    )  # fmt: skip
    facts = {"commit": "c0ffee", "random_weights": {"feature-extraction": ["pooler.dense.bias"]}}
    return Worker(peer=peer, nonce="n", state=state, heard_at=1.0, since=1.0, facts=facts)


def status(*workers: Worker) -> dict[str, Any]:
    return nnsight_status([TINY], workers, {"tiny": (Provision.NONE, "nobody serves")})


def test_each_task_of_each_replica_is_an_entry() -> None:
    found = status(worker(0, "warm"), worker(1, "loading"))
    told = {name: (each["task"], each["application_state"]) for name, each in found.items()}
    assert told == {
        "tiny/0": ("text-generation", "RUNNING"),
        "tiny/0 feature-extraction": ("feature-extraction", "RUNNING"),
        "tiny/1": ("text-generation", "DEPLOYING"),
        "tiny/1 feature-extraction": ("feature-extraction", "DEPLOYING"),
    }
    keys = {each["model_key"] for each in found.values()}
    assert keys == {key.render() for key in TINY.model_keys}


def test_what_is_random_is_told_of_the_task_that_lacks_it() -> None:
    found = status(worker(0, "warm"))
    assert found["tiny/0"]["random_weights"] == []
    assert found["tiny/0 feature-extraction"]["random_weights"] == ["pooler.dense.bias"]


def test_without_a_worker_each_task_says_why() -> None:
    found = status()
    assert [*found] == ["tiny", "tiny feature-extraction"]
    assert {each["why"] for each in found.values()} == {"nobody serves"}


def test_a_device_on_which_nothing_was_tried_is_told() -> None:
    on_gpu = worker(0, "warm")
    on_gpu.facts |= {"device": "cuda (A6000)", "unverified": True}
    entry = status(on_gpu)["tiny/0"]
    assert (entry["device"], entry["unverified"]) == ("cuda (A6000)", True)
    assert status(worker(0, "warm"))["tiny/0"]["unverified"] is False
