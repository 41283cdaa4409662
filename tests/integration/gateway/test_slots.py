"""Slots over real sockets: a launcher by HTTP, pilots and workers by ZeroMQ, and requests that fit into what is left."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from edif_hpc.domain.allocation import AllocationState
from edif_hpc.domain.people import Role
from edif_hpc.domain.request import RequestState
from edif_hpc.testing.engine import saved
from edif_hpc.testing.gateway import World
from edif_hpc.testing.peer import Peer, until
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import KeyPair

A = AllocationState
SITE = "hpc"


class Http:
    """The relay's `/api` with the token of a role."""

    def __init__(self, world: World, token: str) -> None:
        self._base = f"http://127.0.0.1:{world.relay.port}/api"
        self._headers = {"ndif-api-key": token}

    async def post(self, path: str, body: dict[str, Any], *, status: int = 200) -> Any:
        async with httpx.AsyncClient(headers=self._headers) as http:
            answer = await http.post(self._base + path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def get(self, path: str, *, status: int = 200) -> Any:
        async with httpx.AsyncClient(headers=self._headers) as http:
            answer = await http.get(self._base + path)
        assert answer.status_code == status, answer.text
        return answer.json()


async def http_of(world: World, role: Role) -> Http:
    _, token = await world.relay.accounts.create(name=f"a {role}", role=role)
    return Http(world, token)


async def fetched(world: World, launcher: Http) -> dict[str, Any]:
    """The first order, once the relay has made it."""
    await until(world.relay.core.fleet.live, "the relay has made an order")
    body = {"site": SITE, "launcher": "login1", "limit": 4}
    (order,) = (await launcher.post("/launcher/orders", body))["orders"]
    found: dict[str, Any] = order
    return found


async def joined(world: World, order: dict[str, Any]) -> tuple[KeyPair, Peer]:
    """The worker's keys and the pilot's connection of an order's job."""
    worker, pilot = KeyPair.generate(), KeyPair.generate()
    await world.relay.core.fleet.join(
        order["join_token"], worker_key=worker.public, pilot_key=pilot.public, node="n1"
    )
    return worker, await world.peer(pilot)


async def warm(world: World, keys: KeyPair) -> Peer:
    peer = await world.peer(keys)
    await peer.greet()
    return peer


def state(world: World, allocation: str) -> AllocationState | None:
    row = world.relay.core.fleet.allocation(allocation)
    return None if row is None else row.state


async def test_a_generation_hands_over_to_the_next(world: World) -> None:
    operator = await http_of(world, Role.OPERATOR)
    launcher = await http_of(world, Role.LAUNCHER)
    up = {"deployment": "tiny", "site": SITE, "walltime_min": 60, "gpu": "a6000", "gpus": 2}
    assert (await operator.post("/allocations", up, status=201))["allocations"] == []
    order = await fetched(world, launcher)
    assert (order["gpu"], order["gpus"], order["walltime_min"]) == ("a6000", 2, 60)
    keys, pilot = await joined(world, order)
    pilot.say(m.Hello(versions=[1], nonce="p", state="pilot", job="77", restart=1, left_s=3000.0))
    await pilot.hears(m.Welcome)
    worker = await warm(world, keys)
    await until(lambda: state(world, order["allocation"]) is A.WARM, "it is warm")
    await until(
        lambda: world.relay.core.fleet.allocation(order["allocation"]).job_id == "77",  # type: ignore[union-attr]
        "the pilot told its job",
    )
    pilot.say(m.Revive(turn=7))
    told = await pilot.hears(m.Order)
    assert ("no successor" in told.reason, told.turn) == (True, 7)

    pilot.say(m.Renew(left_s=500.0))
    await pilot.hears(m.Beat)
    successors = lambda: [e for e in world.relay.core.fleet.live() if e.generation == 2]  # noqa: E731
    await until(successors, "its successor is ordered")
    pilot.say(m.Revive(turn=8))
    ticket = await pilot.hears(m.Order, nth=2)
    assert (ticket.generation, ticket.name) == (2, successors()[0].name)
    assert (ticket.allocation is not None, ticket.turn) == (True, 8)
    pilot.say(m.Ordered(allocation=ticket.allocation or "", job_id="78", turn=9))
    heard = await pilot.hears(m.Order, nth=3)
    assert (heard.reason, heard.turn) == ("heard", 9)
    assert state(world, ticket.allocation or "") is A.SUBMITTED
    body = {"site": SITE, "launcher": "login1", "limit": 4}
    assert (await launcher.post("/launcher/orders", body))["orders"] == []

    lines = (await operator.get("/ps"))["processes"]
    old = next(each for each in lines if each["generation"] == 1)
    assert old["successor"] == ticket.name
    assert 400 < old["left_s"] <= 500
    assert old["why"]
    jobs = [
        {"name": ticket.name, "job_id": "78", "state": "PENDING", "reason": "Priority",
         "node": None, "start_in_s": 120.0, "left_s": None},
    ]  # fmt: skip
    await launcher.post("/launcher/report", {"site": SITE, "launcher": "login1", "jobs": jobs})
    told = await operator.get("/slots/tiny/0")
    assert [each["generation"] for each in told["generations"]] == [1, 2]
    assert told["generations"][1]["reason"] == "Priority"
    assert told["launcher"]["name"] == "login1"
    heard = (await operator.get("/launchers"))["launchers"]
    assert heard[SITE]["name"] == "login1"

    next_keys, _ = await joined(
        world, {"join_token": ticket.join_token, "allocation": ticket.allocation}
    )
    await warm(world, next_keys)
    await until(lambda: state(world, order["allocation"]) is A.DRAINING, "the old one drains")
    row = world.relay.core.fleet.allocation(order["allocation"])
    assert row is not None
    assert "takes its place" in row.detail
    await worker.greet()
    assert [each for each in worker.heard if isinstance(each, m.Welcome)][-1].drain


async def test_a_request_goes_only_where_it_fits(world: World) -> None:
    world.short_runs()  # then a request needs its 0.1 s, and the margin
    operator = await http_of(world, Role.OPERATOR)
    await operator.post(
        "/allocations", {"deployment": "tiny", "site": SITE, "walltime_min": 60}, status=201
    )
    order = await fetched(world, await http_of(world, Role.LAUNCHER))
    keys, pilot = await joined(world, order)
    pilot.say(m.Hello(versions=[1], nonce="p", state="pilot", left_s=96.0))
    await pilot.hears(m.Welcome)
    worker = await warm(world, keys)
    request = await world.relay.accept()
    assert (await worker.hears(m.Grant)).request == request
    pilot.say(m.Renew(left_s=95.05))
    await pilot.hears(m.Beat)
    worker.say(m.Return(request=request, attempt=1, reason="drained"))
    await until(
        lambda: world.relay.row(request).state is RequestState.QUEUED, "the request waits again"
    )
    other = await world.worker(auto=lambda _: saved(b"r"))
    assert (await world.relay.ended(request)).state is RequestState.COMPLETED
    assert sum(isinstance(each, m.Grant) for each in worker.heard) == 1
    assert world.relay.row(request).attempt == 2
    assert other.key in world.serving()


async def test_a_worker_drains_by_itself_at_its_end(world: World) -> None:
    operator = await http_of(world, Role.OPERATOR)
    await operator.post(
        "/allocations", {"deployment": "tiny", "site": SITE, "walltime_min": 60}, status=201
    )
    order = await fetched(world, await http_of(world, Role.LAUNCHER))
    keys, pilot = await joined(world, order)
    pilot.say(m.Hello(versions=[1], nonce="p", state="pilot", left_s=94.0))
    worker = await warm(world, keys)
    assert "walltime ends" in (await worker.hears(m.Drain)).reason


@pytest.mark.parametrize("role", list(Role))
async def test_what_a_token_may(world: World, role: Role) -> None:
    http = await http_of(world, role)
    launches = 200 if role in {Role.LAUNCHER, Role.OPERATOR} else 403
    operates = 200 if role is Role.OPERATOR else 403
    await http.post("/launcher/orders", {"site": SITE, "launcher": "x"}, status=launches)
    await http.post("/launcher/report", {"site": SITE, "launcher": "x"}, status=launches)
    await http.get("/launcher/addresses", status=launches)
    await http.get("/ps", status=operates)
    await http.get("/launchers", status=operates)
    await http.get("/deployments", status=operates)
    await http.get("/slots/tiny/9", status=404 if role is Role.OPERATOR else 403)


@pytest.mark.parametrize(
    "body",
    [
        {"site": SITE},
        {"site": "", "launcher": "x"},
        {"site": SITE, "launcher": "x", "limit": -1},
        {"site": SITE, "launcher": "x", "limt": 1},
    ],
)
async def test_a_malformed_fetch_is_refused(world: World, body: dict[str, Any]) -> None:
    launcher = await http_of(world, Role.LAUNCHER)
    await launcher.post("/launcher/orders", body, status=400)


@pytest.mark.parametrize(
    "said",
    [
        {"jobs": {}},
        {"jobs": [{"name": "a"}]},
        {"jobs": [{"name": "a", "job_id": "1", "state": "PENDING", "left_s": -1.0}]},
        {"refused": [{"allocation": "a", "kind": "because", "detail": ""}]},
        {"submitted": [{"allocation": "a"}]},
        {"gone": []},
    ],
)
async def test_a_malformed_report_is_refused(world: World, said: dict[str, Any]) -> None:
    launcher = await http_of(world, Role.LAUNCHER)
    body = {"site": SITE, "launcher": "x", **said}
    await launcher.post("/launcher/report", body, status=400)


async def test_a_scheduler_that_cannot_be_asked_changes_nothing(world: World) -> None:
    operator, launcher = await http_of(world, Role.OPERATOR), await http_of(world, Role.LAUNCHER)
    await operator.post(
        "/allocations", {"deployment": "tiny", "site": SITE, "walltime_min": 60}, status=201
    )
    order = await fetched(world, launcher)
    done = {"submitted": [{"allocation": order["allocation"], "job_id": "77"}]}
    body = {"site": SITE, "launcher": "login1", "jobs": None, "detail": "Socket timed out"}
    await launcher.post("/launcher/report", body | done)
    for _ in range(5):
        await launcher.post("/launcher/report", body)
    assert state(world, order["allocation"]) is A.SUBMITTED


async def test_a_site_needs_a_walltime(world: World) -> None:
    operator = await http_of(world, Role.OPERATOR)
    told = await operator.post("/allocations", {"deployment": "tiny", "site": SITE}, status=400)
    assert "--walltime" in told["detail"]
