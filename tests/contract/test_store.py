"""What every store does, on all of them: the fake has to be as strict as the real one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.allocation import Allocation, AllocationState, Peer, PeerRole
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.lease import CRASH_BUDGET, QUARANTINE_WORKERS, LeaseEnd
from edif_hpc.domain.limits import Allowed
from edif_hpc.domain.people import Role, Token
from edif_hpc.domain.request import (
    Failure,
    FailureKind,
    Limits,
    NewRequest,
    Request,
    RequestState,
    ResultRef,
)
from edif_hpc.errors import (
    Conflict,
    EdifError,
    InvalidInput,
    NotAuthenticated,
    NotFound,
    StaleAttempt,
    StoreUnavailable,
    TransitionRefused,
)
from edif_hpc.failpoints import Action, Armed, FailpointReached, Failpoints
from edif_hpc.store.base import Attempt, Charge, Store
from tests.contract.conftest import Each, Make

QUEUED, DISPATCHED, RUNNING = RequestState.QUEUED, RequestState.DISPATCHED, RequestState.RUNNING
COMPLETED, ERROR = RequestState.COMPLETED, RequestState.ERROR

USER_ERROR = Failure(kind=FailureKind.USER, message="ValueError: no", details={"line": 3})
CANCELLED = Failure(kind=FailureKind.CANCELLED, message="cancelled by its owner")


def new_request(request_id: str = "r1", **changes: Any) -> NewRequest:
    base = NewRequest(
        id=request_id,
        owner="ada",
        deployment="tiny",
        model_key='nnsight.modeling.transformers.TransformersModel:{"repo_id": "edif/tiny"}',
        compress=True,
        env={"attn_implementation": "eager"},
        blob_bytes=4,
        blob_sha256="0" * 64,
        limits=Limits(wall_s=60.0),
        accepted_at=100.0,
        expires_at=1000.0,
        keep=True,
        client={"nnsight": "0.8.1"},
    )
    return replace(base, **changes)


def new_allocation(allocation_id: str = "a" * 16, **changes: Any) -> Allocation:
    base = Allocation(
        id=allocation_id,
        deployment="tiny",
        slot=0,
        generation=1,
        site="local",
        state=AllocationState.SUBMITTED,
        submitted_at=100.0,
    )
    return replace(base, **changes)


def new_token(token_id: str = "ada", **changes: Any) -> Token:
    base = Token(
        id=token_id, name="Ada", role=Role.RESEARCHER, secret_sha256="1" * 64, created_at=50.0
    )
    return replace(base, **changes)


def new_peer(key: str = "k" * 40, **changes: Any) -> Peer:
    base = Peer(
        key=key,
        role=PeerRole.WORKER,
        allocation="a" * 16,
        deployment="tiny",
        slot=0,
        generation=1,
        created_at=110.0,
    )
    return replace(base, **changes)


def everything(store: Store) -> dict[str, Any]:
    """All that can be read from a store."""
    requests = store.requests(limit=1000)
    allocations = store.allocations(live_only=False)
    return {
        "requests": requests,
        "attempts": {each.id: store.attempts(each.id) for each in requests},
        "blobs": {each.id: store.blob(each.id) for each in requests},
        "results": {each.id: store.inline_result(each.id) for each in requests},
        "charges": store.charges(),
        "tokens": store.tokens(),
        "deployments": store.deployments(),
        "allocations": allocations,
        "events": {each.id: store.allocation_events(each.id) for each in allocations},
        "peers": store.peers(),
    }


def complete(do: Any, request_id: str, attempt: int, holder: str, now: float) -> Request:
    result: Request = do.complete(
        request_id,
        attempt,
        holder,
        now,
        result=ResultRef(size_bytes=5, key=None),
        inline=b"bytes",
        meta={"seed": 7},
    )
    return result


# -- every action in every situation -------------------------------------------------------------


def queued(do: Any) -> None:
    do.accept(new_request(), b"blob")


def dispatched(do: Any) -> None:
    queued(do)
    do.lease("r1", "w1", 110.0)


def running(do: Any) -> None:
    dispatched(do)
    do.start("r1", 1, "w1", 120.0)


def completed(do: Any) -> None:
    running(do)
    complete(do, "r1", 1, "w1", 130.0)


def failed(do: Any) -> None:
    running(do)
    do.fail("r1", 1, "w1", 130.0, failure=USER_ERROR, meta={})


def cancelled(do: Any) -> None:
    running(do)
    do.end("r1", 130.0, failure=CANCELLED)


def requeued(do: Any) -> None:
    running(do)
    do.release("r1", 1, "w1", 130.0, end=LeaseEnd.EXPIRED, evidence={})


def retaken(do: Any) -> None:
    requeued(do)
    do.lease("r1", "w1", 140.0)


def unknown(do: Any) -> None:
    """No request at all."""


ACTIONS: dict[str, Callable[[Any], Request]] = {
    "lease": lambda do: do.lease("r1", "w1", 200.0).request,
    "start": lambda do: do.start("r1", 1, "w1", 200.0),
    "release": lambda do: do.release("r1", 1, "w1", 200.0, end=LeaseEnd.DRAINED, evidence={}),
    "complete": lambda do: complete(do, "r1", 1, "w1", 200.0),
    "fail": lambda do: do.fail("r1", 1, "w1", 200.0, failure=USER_ERROR, meta={}),
    "end": lambda do: do.end("r1", 200.0, failure=CANCELLED),
    "forget": lambda do: do.forget_result("r1", 200.0),
}

SAME = "same"
STALE = StaleAttempt
NO = TransitionRefused

# The worker's actions are those of attempt 1, also where attempt 2 holds the lease.
OUTCOMES: dict[Callable[[Any], None], tuple[Any, ...]] = {
    #           lease       start    release complete   fail   end    forget
    queued: (DISPATCHED, STALE, STALE, STALE, STALE, ERROR, NO),
    dispatched: (NO, RUNNING, QUEUED, COMPLETED, ERROR, ERROR, NO),
    running: (NO, SAME, QUEUED, COMPLETED, ERROR, ERROR, NO),
    completed: (NO, STALE, STALE, SAME, STALE, NO, COMPLETED),
    failed: (NO, STALE, STALE, STALE, SAME, NO, NO),
    cancelled: (NO, STALE, STALE, STALE, STALE, NO, NO),
    requeued: (DISPATCHED, STALE, STALE, STALE, STALE, ERROR, NO),
    retaken: (NO, STALE, STALE, STALE, STALE, ERROR, NO),
    unknown: (NotFound,) * 7,
}
CELLS = [
    pytest.param(situation, action, outcome, id=f"{action}-{situation.__name__}")
    for situation, outcomes in OUTCOMES.items()
    for action, outcome in zip(ACTIONS, outcomes, strict=True)
]


@pytest.mark.parametrize(("situation", "action", "outcome"), CELLS)
def test_every_action_in_every_situation(
    store: Store, do: Any, situation: Callable[[Any], None], action: str, outcome: Any
) -> None:
    situation(do)
    before = everything(store)
    if isinstance(outcome, RequestState):
        after = ACTIONS[action](do)
        assert after.state is outcome
        assert store.get("r1") == after
        assert everything(store) != before
    elif outcome == SAME:
        assert ACTIONS[action](do) == before["requests"][0]
        assert everything(store) == before
    else:
        with pytest.raises(EdifError) as refusal:
            ACTIONS[action](do)
        assert type(refusal.value) is outcome
        assert everything(store) == before


@pytest.mark.parametrize("action", ["start", "release", "complete", "fail"])
def test_a_write_of_another_holder_or_of_no_attempt_yet_is_stale(
    store: Store, do: Any, action: str
) -> None:
    do.accept(new_request(), None)
    do.lease("r1", "w2", 110.0)  # the actions are those of w1
    with pytest.raises(StaleAttempt, match="attempt 1 by w1 does not hold"):
        ACTIONS[action](do)
    do.release("r1", 1, "w2", 120.0, end=LeaseEnd.DRAINED, evidence={})
    do.lease("r1", "w1", 130.0)
    with pytest.raises(StaleAttempt):
        ACTIONS[action](do)
    assert [each.holder for each in store.attempts("r1")] == ["w2", "w1"]


@pytest.mark.parametrize(("attempt", "holder"), [(1, "w1"), (1, "w2"), (2, "w1"), (3, "w2")])
@pytest.mark.parametrize("answer", ["complete", "fail"])
def test_only_the_attempt_that_answered_may_repeat_it(
    store: Store, do: Any, answer: str, attempt: int, holder: str
) -> None:
    requeued(do)
    do.lease("r1", "w2", 140.0)

    def say(attempt: int, holder: str) -> Request:
        if answer == "complete":
            return complete(do, "r1", attempt, holder, 150.0)
        ended: Request = do.fail("r1", attempt, holder, 150.0, failure=USER_ERROR, meta={})
        return ended

    assert say(2, "w2") == say(2, "w2")
    before = everything(store)
    with pytest.raises(StaleAttempt):
        say(attempt, holder)
    assert everything(store) == before


# -- requests ------------------------------------------------------------------------------------


def test_an_accepted_request_comes_back_as_it_was_sent(store: Store, do: Any) -> None:
    request = do.accept(new_request(), b"blob")
    assert store.get("r1") == request == store.open_requests()[0]
    assert (request.seq, request.state, request.attempt) == (1, QUEUED, 0)
    assert request.limits.wall_s == 60.0
    assert request.env == {"attn_implementation": "eager"}
    assert (request.compress, request.keep) == (True, True)
    assert store.blob("r1") == b"blob"
    assert (store.get("r2"), store.blob("r2"), store.inline_result("r1")) == (None, None, None)


def test_an_id_is_accepted_once(store: Store, do: Any) -> None:
    do.accept(new_request(), b"blob")
    before = everything(store)
    with pytest.raises(Conflict, match="r1"):
        do.accept(new_request(owner="bob"), b"other")
    assert everything(store) == before
    assert do.accept(new_request("r2"), None).seq == 2


def test_what_json_cannot_hold_is_refused(store: Store, do: Any) -> None:
    with pytest.raises(InvalidInput, match="when"):
        do.accept(new_request(env={"when": object()}), None)
    running(do)
    before = everything(store)
    with pytest.raises(InvalidInput, match="loss"):
        do.fail("r1", 1, "w1", 130.0, failure=USER_ERROR, meta={"loss": float("nan")})
    assert everything(store) == before


def test_free_values_come_back_as_json_gives_them(store: Store, do: Any) -> None:
    running(do)
    failure = replace(USER_ERROR, details={"shape": (1, 2)})
    do.fail("r1", 1, "w1", 130.0, failure=failure, meta={"sizes": (3,)})
    request = store.get("r1")
    assert request is not None
    assert request.failure is not None
    assert (request.failure.details, request.meta) == ({"shape": [1, 2]}, {"sizes": [3]})


def test_a_lease_gives_the_blob_and_counts_attempts(store: Store, do: Any) -> None:
    queued(do)
    grant = do.lease("r1", "w1", 110.0)
    assert grant.blob == b"blob"
    assert (grant.request.attempt, grant.request.holder) == (1, "w1")
    do.release("r1", 1, "w1", 115.0, end=LeaseEnd.STOLEN, evidence={"for": "w2"})
    assert do.lease("r1", "w2", 120.0).request.attempt == 2
    assert store.attempts("r1") == [
        Attempt(
            request_id="r1",
            attempt=1,
            holder="w1",
            granted_at=110.0,
            ended_at=115.0,
            end="stolen",
            evidence={"for": "w2"},
        ),
        Attempt(request_id="r1", attempt=2, holder="w2", granted_at=120.0),
    ]


def test_a_released_request_keeps_its_place(store: Store, do: Any) -> None:
    queued(do)
    do.accept(new_request("r2"), None)
    do.lease("r1", "w1", 110.0)
    back = do.release("r1", 1, "w1", 120.0, end=LeaseEnd.EXPIRED, evidence={})
    assert (back.state, back.holder, back.crashes) == (QUEUED, None, 0)
    assert [each.id for each in store.open_requests()] == ["r1", "r2"]


def test_a_started_lease_is_not_stolen(store: Store, do: Any) -> None:
    running(do)
    before = everything(store)
    with pytest.raises(TransitionRefused, match="has started"):
        do.release("r1", 1, "w1", 130.0, end=LeaseEnd.STOLEN, evidence={})
    assert everything(store) == before


def run_and_lose(do: Any, attempt: int, end: LeaseEnd) -> Request:
    do.lease("r1", f"w{attempt}", 100.0 + attempt)
    do.start("r1", attempt, f"w{attempt}", 100.0 + attempt)
    lost: Request = do.release(
        "r1", attempt, f"w{attempt}", 100.5 + attempt, end=end, evidence={"signal": "9"}
    )
    return lost


def test_crashes_spend_the_budget(store: Store, do: Any) -> None:
    queued(do)
    assert [
        run_and_lose(do, n, LeaseEnd.EXECUTOR_CRASH).state for n in range(1, CRASH_BUDGET)
    ] == [QUEUED] * (CRASH_BUDGET - 1)
    last = run_and_lose(do, CRASH_BUDGET, LeaseEnd.OOM)
    assert last.failure is not None
    assert (last.state, last.crashes, last.failure.kind) == (ERROR, 3, FailureKind.OOM)
    assert last.failure.details["signal"] == "9"
    assert len(store.charges()) == 1
    assert store.attempts("r1")[-1].end == "oom"


def test_losses_that_are_not_its_fault_spend_nothing(do: Any) -> None:
    queued(do)
    for attempt in range(1, 3 * CRASH_BUDGET):
        back = run_and_lose(do, attempt, LeaseEnd.PREEMPTED)
    assert (back.state, back.crashes) == (QUEUED, 0)


def test_a_request_that_took_two_workers_is_quarantined(do: Any) -> None:
    queued(do)
    run_and_lose(do, 1, LeaseEnd.WORKER_LOST)
    run_and_lose(do, 2, LeaseEnd.DRAINED)
    last = run_and_lose(do, QUARANTINE_WORKERS + 1, LeaseEnd.WORKER_LOST)
    assert last.failure is not None
    assert last.failure.message.startswith("quarantined")


def test_completion_stores_one_result_and_one_charge(store: Store, do: Any) -> None:
    running(do)
    done = complete(do, "r1", 1, "w1", 150.0)
    assert done.result == ResultRef(size_bytes=5, key=None)
    assert (done.meta, done.holder, done.ended_at) == ({"seed": 7}, None, 150.0)
    assert store.inline_result("r1") == b"bytes"
    assert store.blob("r1") is None  # it cannot run again
    assert store.attempts("r1")[0].end == "completed"
    assert store.charges() == [
        Charge(
            request_id="r1", owner="ada", deployment="tiny", run_s=30.0, queued_s=20.0, at=150.0
        )
    ]
    assert store.open_requests() == []


def test_a_large_result_is_a_key(store: Store, do: Any) -> None:
    dispatched(do)
    large = ResultRef(size_bytes=1 << 30, key="results/r1/1")
    done = do.complete("r1", 1, "w1", 150.0, result=large, inline=None, meta={})
    assert (done.result, store.inline_result("r1")) == (large, None)
    assert store.charges()[0].run_s == 40.0  # its START never came, so it counts from the grant


@pytest.mark.parametrize(("key", "inline"), [(None, None), ("results/r1/1", b"bytes")])
def test_a_result_is_bytes_or_a_key(
    store: Store, do: Any, key: str | None, inline: bytes | None
) -> None:
    running(do)
    before = everything(store)
    result = ResultRef(size_bytes=5, key=key)
    with pytest.raises(InvalidInput, match="one of them"):
        do.complete("r1", 1, "w1", 150.0, result=result, inline=inline, meta={})
    assert everything(store) == before


@pytest.mark.parametrize(
    ("situation", "ended_by", "run_s", "queued_s"),
    [
        (queued, None, 0.0, 50.0),
        (dispatched, "cancelled", 0.0, 50.0),
        (running, "cancelled", 30.0, 20.0),
    ],
)
def test_an_end_without_a_worker_charges_what_ran(
    store: Store, do: Any, situation: Any, ended_by: str | None, run_s: float, queued_s: float
) -> None:
    situation(do)
    ended = do.end("r1", 150.0, failure=CANCELLED)
    assert (ended.failure, ended.holder, store.blob("r1")) == (CANCELLED, None, None)
    assert [each.end for each in store.attempts("r1")] == [ended_by] * bool(ended_by)
    assert [(each.run_s, each.queued_s) for each in store.charges()] == [(run_s, queued_s)]


def test_a_clock_that_jumped_back_charges_nothing(store: Store, do: Any) -> None:
    running(do)
    complete(do, "r1", 1, "w1", 10.0)
    assert store.charges()[0].run_s == 0.0


def test_a_result_is_forgotten_once(store: Store, do: Any) -> None:
    completed(do)
    assert [each.id for each in store.ended_before(131.0, limit=9)] == ["r1"]
    assert store.ended_before(130.0, limit=9) == []
    assert do.forget_result("r1", 500.0).result.deleted_at == 500.0
    assert do.forget_result("r1", 600.0).result.deleted_at == 500.0
    assert store.inline_result("r1") is None
    assert store.ended_before(1000.0, limit=9) == []
    assert do.complete(  # still recognised, and the bytes do not come back
        "r1", 1, "w1", 700.0, result=ResultRef(size_bytes=5, key=None), inline=b"bytes", meta={}
    ).result == ResultRef(size_bytes=5, key=None, deleted_at=500.0)
    assert store.inline_result("r1") is None


def test_retention_takes_the_oldest_first(store: Store, do: Any) -> None:
    for number, ended_at in enumerate([300.0, 200.0, 250.0], start=1):
        do.accept(new_request(f"r{number}"), None)
        do.lease(f"r{number}", "w1", 110.0)
        complete(do, f"r{number}", 1, "w1", ended_at)
    assert [each.id for each in store.ended_before(290.0, limit=9)] == ["r2", "r3"]
    assert [each.id for each in store.ended_before(999.0, limit=2)] == ["r2", "r3"]


def test_listings_filter_and_page(store: Store, do: Any) -> None:
    for number in range(1, 7):
        do.accept(new_request(f"r{number}", owner="ada" if number % 2 else "bob"), None)
    do.lease("r3", "w1", 110.0)
    do.end("r5", 110.0, failure=CANCELLED)

    def ids(**filters: Any) -> str:
        return "".join(each.id for each in store.requests(**filters))

    assert ids() == "r6r5r4r3r2r1"
    assert ids(limit=2) == "r6r5"
    assert ids(limit=2, before_seq=5) == "r4r3"
    assert ids(owner="ada") == "r5r3r1"
    assert ids(owner="ada", before_seq=5, limit=1) == "r3"
    assert ids(states=[QUEUED]) == "r6r4r2r1"
    assert ids(states=iter([DISPATCHED, ERROR]), owner="ada") == "r5r3"
    assert ids(states=[RequestState.PROVISIONING]) == ""
    assert ids(owner="eve") == ""


def test_charges_and_run_times(store: Store, do: Any) -> None:
    for number, deployment in enumerate(["tiny", "tiny", "big", "tiny"], start=1):
        owner = "ada" if number < 3 else "bob"
        do.accept(new_request(f"r{number}", owner=owner, deployment=deployment), None)
        do.lease(f"r{number}", "w1", 110.0)
        do.start(f"r{number}", 1, "w1", 110.0)
        complete(do, f"r{number}", 1, "w1", 110.0 + number)
    do.accept(new_request("never-ran"), None)
    do.end("never-ran", 120.0, failure=CANCELLED)
    assert [each.request_id for each in store.charges(owner="ada")] == ["r1", "r2", "never-ran"]
    assert len(store.charges()) == 5
    assert store.run_seconds("tiny") == [4.0, 2.0, 1.0]
    assert store.run_seconds("tiny", limit=1) == [4.0]
    assert store.run_seconds("none") == []


# -- people --------------------------------------------------------------------------------------


def test_tokens(store: Store, do: Any) -> None:
    full = new_token(
        "bob",
        created_at=40.0,
        expires_at=9.0,
        queue_s=2.0,
        keep=True,
        limits=Allowed(wall_s=1.5, gpu_memory_bytes=1 << 40, saved_tensors=3),
    )
    do.add_token(new_token())
    do.add_token(full)
    assert store.tokens() == [full, new_token()]
    with pytest.raises(Conflict, match="ada"):
        do.add_token(new_token(name="another Ada"))
    assert do.revoke_token("ada", 60.0).revoked_at == 60.0
    assert do.revoke_token("ada", 70.0).revoked_at == 60.0
    assert store.tokens()[1] == new_token(revoked_at=60.0)
    with pytest.raises(NotFound, match="eve"):
        do.revoke_token("eve", 60.0)
    fewer = Allowed(log_lines=5)
    assert do.limit_token("ada", lambda _: fewer) == new_token(revoked_at=60.0, limits=fewer)
    assert store.tokens()[1] == new_token(revoked_at=60.0, limits=fewer)
    with pytest.raises(NotFound, match="eve"):
        do.limit_token("eve", lambda _: fewer)


# -- deployments, allocations, peers -------------------------------------------------------------


def test_deployments(store: Store, do: Any) -> None:
    tiny = Deployment(name="tiny", repo_id="edif/tiny", revision=None, task="text-generation")
    big = replace(tiny, name="big", revision="v2", source="/models", trust_remote_code=True)
    big = replace(big, adapters=(Adapter(repo_id="a/b"), Adapter(repo_id="a/c", revision="v1")))
    big = replace(big, more_tasks=("feature-extraction", "fill-mask"), weights="shared")
    big = replace(big, limits=Allowed(wall_s=0.5, scratch_bytes=1 << 40))
    do.add_deployment(tiny)
    do.add_deployment(big)
    assert store.deployments() == [big, tiny]
    fewer = Allowed(log_lines=7)
    assert do.change_deployment("big", limits=fewer) == replace(big, limits=fewer)
    big = replace(big, limits=fewer)
    assert store.deployments() == [big, tiny]
    with pytest.raises(Conflict, match="tiny"):
        do.add_deployment(replace(tiny, repo_id="edif/other"))
    do.remove_deployment("tiny")
    assert store.deployments() == [big]
    with pytest.raises(NotFound, match="tiny"):
        do.remove_deployment("tiny")


@pytest.mark.parametrize(
    ("allocation", "join"),
    [
        (new_allocation(generation=2), "j2"),
        (new_allocation("b" * 16), "j2"),
        (new_allocation("b" * 16, generation=2), "j1"),
    ],
    ids=["id", "place", "token"],
)
def test_an_allocation_has_its_own_id_place_and_token(
    store: Store, do: Any, allocation: Allocation, join: str
) -> None:
    do.add_allocation(new_allocation(), "j1")
    before = everything(store)
    with pytest.raises(Conflict):
        do.add_allocation(allocation, join)
    assert everything(store) == before
    do.add_allocation(new_allocation("b" * 16, generation=2), "j2")


def test_an_allocation_is_moved_and_told_of(store: Store, do: Any) -> None:
    do.add_allocation(new_allocation(), "j1")
    assert do.change_allocation("a" * 16, 101.0, job_id="77").job_id == "77"
    moves = [
        (AllocationState.STARTED, {"node": "n1"}),
        (AllocationState.LOADING, {"detail": "weights"}),
        (AllocationState.WARM, {}),
        (AllocationState.LOADING, {}),
        (AllocationState.WARM, {}),
        (AllocationState.DRAINING, {}),
        (AllocationState.ENDED, {"cause": "walltime"}),
    ]
    for at, (state, facts) in enumerate(moves, start=110):
        do.change_allocation("a" * 16, float(at), state=state, **facts)
    assert store.allocations() == []
    assert store.allocations(live_only=False) == [
        new_allocation(
            state=AllocationState.ENDED,
            job_id="77",
            node="n1",
            detail="weights",
            started_at=110.0,
            warm_at=112.0,
            ended_at=116.0,
            cause="walltime",
        )
    ]
    events = store.allocation_events("a" * 16)
    assert [(each.at, each.event, each.detail) for each in events] == [
        (100.0, "submitted", {}),
        *((float(at), str(state), facts) for at, (state, facts) in enumerate(moves, start=110)),
    ]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"state": AllocationState.WARM}, TransitionRefused),
        ({"state": AllocationState.SUBMITTED}, TransitionRefused),
        ({"state": AllocationState.STARTED, "colour": "red"}, InvalidInput),
        ({"id": "other"}, InvalidInput),
    ],
)
def test_an_unlisted_change_of_an_allocation_is_refused(
    store: Store, do: Any, change: dict[str, Any], error: type[EdifError]
) -> None:
    do.add_allocation(new_allocation(), "j1")
    before = everything(store)
    with pytest.raises(error):
        do.change_allocation("a" * 16, 110.0, **change)
    assert everything(store) == before
    with pytest.raises(NotFound):
        do.change_allocation("nobody", 110.0, job_id="1")


def test_allocations_are_listed_by_age(store: Store, do: Any) -> None:
    do.add_allocation(new_allocation("b" * 16, slot=1, submitted_at=100.0), "j2")
    do.add_allocation(new_allocation("c" * 16, slot=2, submitted_at=90.0), "j3")
    do.add_allocation(new_allocation(), "j1")
    assert [each.id[0] for each in store.allocations()] == ["c", "a", "b"]


def test_a_join_token_is_spent_once(store: Store, do: Any) -> None:
    do.add_allocation(new_allocation(), "j1")
    assert do.join("j1", 110.0) == new_allocation()
    for token in ["j1", "j2"]:
        with pytest.raises(NotAuthenticated):
            do.join(token, 120.0)


def test_the_token_of_an_ended_allocation_is_void(store: Store, do: Any) -> None:
    do.add_allocation(new_allocation(), "j1")
    do.change_allocation("a" * 16, 105.0, state=AllocationState.ENDED)
    with pytest.raises(NotAuthenticated):
        do.join("j1", 110.0)


def test_an_undone_join_leaves_the_token_unspent(store: Store, do: Any) -> None:
    do.add_allocation(new_allocation(), "j1")
    do.join("j1", 105.0)
    do.add_peers([new_peer()])
    do.add_allocation(new_allocation("b" * 16, generation=2), "j2")

    def join_with_a_known_key() -> None:
        with store.transaction(), store.savepoint():
            store.join("j2", 110.0)
            store.add_peers([new_peer("l" * 40), new_peer()])

    with pytest.raises(Conflict):
        join_with_a_known_key()
    assert store.peers() == [new_peer()]
    assert do.join("j2", 120.0).generation == 2


def test_peers_are_revoked_with_their_allocation(store: Store, do: Any) -> None:
    do.add_allocation(new_allocation(), "j1")
    do.add_allocation(new_allocation("b" * 16, slot=1), "j2")
    worker, pilot = new_peer(), new_peer("p" * 40, role=PeerRole.PILOT)
    other = new_peer("o" * 40, allocation="b" * 16, slot=1, created_at=105.0)
    do.add_peers([worker, pilot, other])
    assert store.peers() == [other, worker, pilot]
    do.revoke_peers("a" * 16, 120.0)
    do.revoke_peers("a" * 16, 130.0)
    assert store.peers() == [other]
    assert [each.key for each in store.peers(revoked=True)] == ["o" * 40, worker.key, pilot.key]
    with pytest.raises(Conflict):  # a revoked key never comes back
        do.add_peers([worker])
    with pytest.raises(NotFound, match="nowhere"):
        do.add_peers([new_peer("n" * 40, allocation="nowhere")])


# -- transactions --------------------------------------------------------------------------------


def test_a_refused_operation_does_not_undo_its_neighbours(store: Store) -> None:
    with store.transaction():
        with store.savepoint():
            store.accept(new_request("r1"), b"1")
        with suppress(Conflict), store.savepoint():
            store.accept(new_request("r2"), b"2")
            store.lease("r2", "w1", 110.0)
            store.accept(new_request("r1"), None)
        with store.savepoint():
            store.accept(new_request("r3"), b"3")
    assert [(each.id, each.seq) for each in store.open_requests()] == [("r1", 1), ("r3", 2)]
    assert (store.blob("r2"), store.attempts("r2")) == (None, [])


def test_an_exception_undoes_the_whole_transaction(store: Store, do: Any) -> None:
    completed(do)
    do.add_allocation(new_allocation(), "j1")
    do.add_token(new_token())
    before = everything(store)

    def change_and_fail() -> None:
        with store.transaction():
            store.accept(new_request("r2"), b"2")
            store.forget_result("r1", 200.0)
            store.revoke_token("ada", 200.0)
            store.change_allocation("a" * 16, 200.0, state=AllocationState.STARTED)
            store.add_deployment(Deployment(name="d", repo_id="a/b", revision=None, task="t"))
            store.join("j1", 200.0)
            store.add_peers([new_peer()])
            raise KeyError

    with pytest.raises(KeyError):
        change_and_fail()
    assert everything(store) == before
    assert do.join("j1", 210.0) == new_allocation()


def test_a_transaction_sees_its_own_changes_and_others_do_not(store: Store) -> None:
    seen: list[Request | None] = []

    def look() -> None:
        seen.append(store.get("r1"))

    with store.transaction():
        store.accept(new_request(), b"blob")
        assert store.get("r1") is not None
        assert store.blob("r1") == b"blob"
        other = threading.Thread(target=look)
        other.start()
        other.join()
    assert seen == [None]
    look()
    assert seen[1] is not None


def test_nothing_is_written_outside_a_transaction(store: Store, do: Any) -> None:
    dispatched(do)
    before = everything(store)
    writes: list[Callable[[], Any]] = [
        lambda: store.accept(new_request("r2"), None),
        lambda: store.start("r1", 1, "w1", 120.0),
        lambda: store.add_token(new_token()),
        lambda: store.revoke_peers("a" * 16, 120.0),
        lambda: store.join("j1", 120.0),
        lambda: store.savepoint().__enter__(),
    ]
    for write in writes:
        with pytest.raises(StoreUnavailable, match="transaction"):
            write()
    assert everything(store) == before


def test_a_transaction_does_not_begin_twice(store: Store, do: Any) -> None:
    with store.transaction(), pytest.raises(StoreUnavailable, match="a second"):
        store.transaction().__enter__()
    queued(do)  # and the store is still usable


def test_transactions_of_two_threads_take_turns(store: Store) -> None:
    def accept_many(prefix: str) -> None:
        for number in range(50):
            with store.transaction(), store.savepoint():
                store.accept(new_request(f"{prefix}{number}"), None)

    threads = [threading.Thread(target=accept_many, args=(each,)) for each in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(each.seq for each in store.open_requests()) == list(range(1, 101))


@pytest.mark.parametrize("place", ["store.commit.before", "store.commit.after"])
def test_a_fault_at_the_commit_is_all_or_nothing(make: Make, place: str) -> None:
    store = make(Failpoints({place: Armed(action=Action.RAISE, nth=2)}))
    do = Each(store)
    queued(do)
    before = everything(store)

    def change() -> None:
        with store.transaction():
            store.lease("r1", "w1", 110.0)
            store.accept(new_request("r2"), b"2")

    with pytest.raises(FailpointReached):
        change()
    if place == "store.commit.before":
        assert everything(store) == before
        do.lease("r1", "w2", 120.0)
    else:
        assert [each.state for each in store.requests()] == [QUEUED, DISPATCHED]


def test_a_closed_store_is_refused(store: Store, do: Any) -> None:
    queued(do)
    store.close()
    store.close()
    with pytest.raises(StoreUnavailable, match="not open"):
        store.get("r1")
    with pytest.raises(StoreUnavailable, match="not open"):
        do.lease("r1", "w1", 110.0)
    store.open()
    assert store.get("r1") is not None
    do.lease("r1", "w1", 110.0)
