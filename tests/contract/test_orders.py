"""Orders, on every store: one holder at a time, a new token each time, and rows of before that come along."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.domain.allocation import Allocation, AllocationState, Peer, PeerRole
from edif_hpc.domain.deployment import Deployment
from edif_hpc.errors import (
    Conflict,
    EdifError,
    InvalidInput,
    NotAuthenticated,
    NotFound,
    TransitionRefused,
)
from edif_hpc.store import sql
from edif_hpc.store.base import Store
from edif_hpc.store.sqlite import SqliteStore

ID = "a" * 16
ORDER = Allocation(
    id=ID,
    deployment="tiny",
    slot=1,
    generation=3,
    site="hpc",
    state=AllocationState.ORDERED,
    submitted_at=100.0,
    walltime_min=60,
    begin_after_s=30.0,
)


def take(do: Any, holder: str, now: float, token: str) -> Allocation:
    taken: Allocation = do.take_order(ID, holder, now, lease_s=60.0, join_sha256=token)
    return taken


def events(store: Store) -> list[tuple[str, float]]:
    return [(each.event, each.at) for each in store.allocation_events(ID)]


def test_an_order_is_an_allocation_without_a_token(store: Store, do: Any) -> None:
    do.add_allocation(ORDER, None)
    do.add_allocation(replace(ORDER, id="b" * 16, slot=2), None)
    assert store.allocations() == [ORDER, replace(ORDER, id="b" * 16, slot=2)]
    assert events(store) == [("ordered", 100.0)]


def test_an_order_is_held_by_one_at_a_time(store: Store, do: Any) -> None:
    do.add_allocation(ORDER, None)
    held = take(do, "login1", 200.0, "t1")
    assert (held.order_holder, held.order_until) == ("login1", 260.0)
    with pytest.raises(TransitionRefused, match="held by login1"):
        take(do, "login2", 259.0, "t2")
    assert store.allocations() == [held]
    assert take(do, "login1", 230.0, "t3").order_until == 290.0
    assert take(do, "login2", 290.0, "t4").order_holder == "login2"


def test_only_the_newest_token_joins(do: Any) -> None:
    do.add_allocation(ORDER, None)
    take(do, "login1", 200.0, "t1")
    take(do, "login1", 210.0, "t2")
    with pytest.raises(NotAuthenticated):
        do.join("t1", 220.0)
    assert do.join("t2", 220.0).id == ID
    with pytest.raises(NotAuthenticated):
        do.join("t2", 221.0)


def test_a_token_is_one_allocations_own(store: Store, do: Any) -> None:
    do.add_allocation(ORDER, None)
    do.add_allocation(replace(ORDER, id="b" * 16, slot=2, state=AllocationState.SUBMITTED), "t1")
    before = store.allocations()
    with pytest.raises(Conflict):
        take(do, "login1", 200.0, "t1")
    assert store.allocations() == before
    assert do.join("t1", 220.0).id == "b" * 16


def test_a_freed_order_is_anybodys_and_its_token_is_void(store: Store, do: Any) -> None:
    do.add_allocation(ORDER, None)
    take(do, "login1", 200.0, "t1")
    with pytest.raises(TransitionRefused, match="not by login2"):
        do.free_order(ID, "login2")
    assert do.free_order(ID, "login1") == ORDER
    assert store.allocations() == [ORDER]
    with pytest.raises(NotAuthenticated):
        do.join("t1", 220.0)
    assert take(do, "login2", 201.0, "t2").order_holder == "login2"


def test_a_submission_is_reported_by_the_holder_and_once(store: Store, do: Any) -> None:
    do.add_allocation(ORDER, None)
    with pytest.raises(TransitionRefused, match="held by nobody"):
        do.submit_order(ID, "login1", "77", 210.0)
    take(do, "login1", 200.0, "t1")
    with pytest.raises(TransitionRefused, match="not by login2"):
        do.submit_order(ID, "login2", "78", 210.0)
    done = do.submit_order(ID, "login1", "77", 210.0)
    assert (done.state, done.job_id) == (AllocationState.SUBMITTED, "77")
    assert done.order_until is None
    assert do.submit_order(ID, "login1", "77", 240.0) == done
    with pytest.raises(TransitionRefused):
        do.submit_order(ID, "login1", "79", 240.0)
    with pytest.raises(TransitionRefused):
        take(do, "login1", 300.0, "t2")
    with pytest.raises(TransitionRefused):
        do.free_order(ID, "login1")
    assert store.allocations() == [done]
    assert events(store) == [("ordered", 100.0), ("taken", 200.0), ("submitted", 210.0)]
    assert store.allocation_events(ID)[1].detail == {"holder": "login1"}
    assert store.allocation_events(ID)[2].detail == {"job_id": "77", "holder": "login1"}


def test_a_job_may_begin_before_its_submission_was_reported(store: Store, do: Any) -> None:
    do.add_allocation(ORDER, None)
    take(do, "login1", 200.0, "t1")
    do.join("t1", 205.0)
    started = do.change_allocation(ID, 205.0, state=AllocationState.STARTED, node="n1")
    assert started.started_at == 205.0
    late = do.submit_order(ID, "login1", "77", 210.0)
    assert (late.state, late.job_id) == (AllocationState.STARTED, "77")
    assert events(store) == [("ordered", 100.0), ("taken", 200.0), ("started", 205.0)]


@pytest.mark.parametrize("state", [AllocationState.SUBMITTED, AllocationState.ENDED])
def test_what_is_no_order_cannot_be_taken(store: Store, do: Any, state: AllocationState) -> None:
    do.add_allocation(ORDER, None)
    take(do, "login1", 200.0, "t1")
    do.change_allocation(ID, 210.0, state=state)
    before = store.allocations(live_only=False)
    for op in (
        lambda: take(do, "login1", 300.0, "t2"),
        lambda: do.free_order(ID, "login1"),
    ):
        with pytest.raises(TransitionRefused, match=f"is {state}"):
            op()
    assert store.allocations(live_only=False) == before


@pytest.mark.parametrize(
    "op",
    [
        lambda do: take(do, "login1", 200.0, "t1"),
        lambda do: do.free_order(ID, "login1"),
        lambda do: do.submit_order(ID, "login1", "77", 1.0),
    ],
)
def test_an_unknown_order(do: Any, op: Any) -> None:
    with pytest.raises(NotFound):
        op(do)


def test_a_deployment_is_changed_where_it_may_be(store: Store, do: Any) -> None:
    deployment = Deployment(
        name="tiny", repo_id="a/b", revision=None, task="text-generation", created_at=1.0
    )
    do.add_deployment(deployment)
    facts = {"site": "hpc", "gpu": "a6000", "gpus": 2, "walltime_min": 60, "up_at": 5.0}
    changed = do.change_deployment("tiny", replicas=3, **facts)
    assert changed == replace(deployment, replicas=3, **facts)
    assert store.deployments() == [changed]
    assert do.change_deployment("tiny", up_at=None).up_at is None
    with pytest.raises(InvalidInput, match="dtype"):
        do.change_deployment("tiny", dtype="float16")
    with pytest.raises(NotFound):
        do.change_deployment("other", replicas=1)


def test_rows_of_before_come_along(tmp_path: Path) -> None:
    """A database of the first schema, with an allocation, its events and its peers."""
    path = tmp_path / "queue.sqlite"

    class First(SqliteStore):
        def _steps(self) -> list[sql.Migration]:
            return sql.load_migrations()[:1]

    old = First(path)
    old.open()
    writer = old._open_writer()
    writer.execute(
        "INSERT INTO allocations VALUES ('a', 'tiny', 0, 1, 'local', 'warm', 100.0, '77', 'n1', 130.0,"
        " NULL, NULL, 'serves', 'hash', 120.0)"
    )
    writer.execute("INSERT INTO allocation_events VALUES ('a', 1, 100.0, 'submitted', '{}')")
    writer.execute("INSERT INTO peers VALUES ('k', 'pilot', 'a', 'tiny', 0, 1, 120.0, NULL)")
    old.close()
    store = SqliteStore(path)
    store.open()
    try:
        (row,) = store.allocations()
        assert row == Allocation(
            id="a",
            deployment="tiny",
            slot=0,
            generation=1,
            site="local",
            state=AllocationState.WARM,
            submitted_at=100.0,
            job_id="77",
            node="n1",
            started_at=120.0,
            warm_at=130.0,
            detail="serves",
        )
        assert [each.event for each in store.allocation_events("a")] == ["submitted"]
        assert [each.role for each in store.peers()] == [PeerRole.PILOT]
        bad = Peer(
            key="x",
            role=PeerRole.PILOT,
            allocation="nobody",
            deployment="tiny",
            slot=0,
            generation=1,
            created_at=1.0,
        )
        with pytest.raises(EdifError), store.transaction(), store.savepoint():
            store._insert_peer(bad)  # the reference is still kept
    finally:
        store.close()
