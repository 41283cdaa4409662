"""The pilot with a small relay around it: real sockets, real child processes, workers that are scripts."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from edif_hpc.clock import SystemClock
from edif_hpc.errors import LaunchError, NotAuthenticated
from edif_hpc.pilot.app import main
from edif_hpc.pilot.ending import REFUSED, SIGNALLED, WALLTIME
from edif_hpc.pilot.runtime import Pilot
from edif_hpc.slurm.order import (
    EngineFacts,
    PilotOrder,
    WorkerExit,
    read_worker_order,
    write_order,
)
from edif_hpc.slurm.unheard import find_words
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import Incoming, KeyPair, Router

WAIT_S = 30.0

#: What stands in for `edif_hpc.worker.app`; a test fills in what it does. It notes each start.
WORKER = """
import json, os, pathlib, signal, sys, time
order, pilot, nonce = sys.argv[1:]
folder = pathlib.Path(order).parent
number = len(list(folder.glob("start-*"))) + 1
(folder / "new").write_text(json.dumps({"nonce": nonce, "pilot": int(pilot)}))
(folder / "new").rename(folder / f"start-{number}")  # whole, whenever it is read
"""


class FakeRelay:
    """Lets pilots join, listens to them, and answers what a test says."""

    def __init__(self) -> None:
        self.keys = KeyPair.generate()
        self.joins: list[dict[str, str]] = []
        self.answers: list[int] = []  # status codes of the next joins, then 200
        self.heard: list[m.FromPeer] = []
        self.routes: list[bytes] = []
        self.known: set[str] = set()
        self.router = Router(
            bind="tcp://127.0.0.1:*",
            keys=self.keys,
            known=lambda key: key in self.known,
            on_batch=self.received,
        )
        routes = [Route("/api/join", self.join, methods=["POST"])]
        config = uvicorn.Config(
            Starlette(routes=routes), port=0, log_level="error", lifespan="off"
        )
        self.server = uvicorn.Server(config)

    async def join(self, request: Request) -> Response:
        body = await request.json()
        self.joins.append(body)
        status = self.answers.pop(0) if self.answers else 200
        if status != 200:
            return JSONResponse({"error": "no"}, status)
        self.known |= {body["worker_key"], body["pilot_key"]}
        where = {"endpoint": self.router.endpoint, "server_key": self.keys.public}
        return JSONResponse({"name": "a1", **where})

    def received(self, batch: list[Incoming]) -> None:
        for each in batch:
            message = codec.decode_from_peer(each.frame)
            self.heard.append(message)
            self.routes.append(each.route)
            if isinstance(message, m.Hello):
                welcome = m.Welcome(version=1, lease_s=30.0, heartbeat_s=5.0, part_bytes=1)
                self.router.send(each.route, codec.encode(welcome))

    def reports(self, event: str) -> list[m.Report]:
        return [each for each in self.heard if isinstance(each, m.Report) and each.event == event]

    @property
    def url(self) -> str:
        host, port = self.server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"


@pytest.fixture
async def relay() -> AsyncIterator[FakeRelay]:
    relay = FakeRelay()
    serving = asyncio.create_task(relay.server.serve())
    await wait_until_async(lambda: relay.server.started, WAIT_S, "the relay serves")
    yield relay
    relay.server.should_exit = True
    await serving
    relay.router.close()


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def pilot(
    relay: FakeRelay,
    scratch: Path,
    script: str,
    monkeypatch: pytest.MonkeyPatch,
    **environ: str,
) -> Pilot:
    """A pilot whose worker is a script; `environ` is more than this process's own."""
    modules = scratch.parent / "modules"
    modules.mkdir(exist_ok=True)
    (modules / "scripted_worker.py").write_text(WORKER + script)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(modules), *filter(None, sys.path)]))
    order = PilotOrder(
        name="edif-tiny-0-1",
        relay_url=relay.url,
        join_token="once",
        scratch=str(scratch),
        engine=EngineFacts(threads=3),
        worker_module="scripted_worker",
    )
    return Pilot(order=order, clock=SystemClock(), environ=dict(os.environ) | environ)


def starts(scratch: Path) -> list[dict[str, str]]:
    return [json.loads(each.read_text()) for each in sorted(scratch.glob("start-*"))]


async def started(scratch: Path, count: int = 1) -> None:
    await wait_until_async(lambda: len(starts(scratch)) >= count, WAIT_S, f"{count} start(s)")


async def test_a_worker_that_drains(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
(folder / "order").write_text(pathlib.Path(order).read_text())
(folder / "worker").mkdir()
(folder / "worker" / "served").write_text("7")
print("bye")
"""
    assert await pilot(relay, scratch, script, monkeypatch).run() == "drained"
    (start,) = starts(scratch)
    assert start["pilot"] == os.getpid()
    record = json.loads((scratch / "exit.json").read_text())
    assert (record["cause"], record["worker_starts"], record["requests"]) == ("drained", 1, 7)

    (joined,) = relay.joins
    copy = scratch / "order"
    copy.chmod(0o600)
    order = read_worker_order(copy)
    assert order.public_key == joined["worker_key"] != joined["pilot_key"]
    assert order.engine.threads == 3
    assert not (scratch / "worker.order").exists(), "it holds a private key"

    await wait_until_async(lambda: relay.heard[-1:] == [m.Goodbye(cause="drained")], WAIT_S, "bye")
    assert isinstance(relay.heard[0], m.Hello)
    (exited,) = relay.reports("worker_exited")
    assert exited.nonce == start["nonce"] == relay.reports("worker_started")[0].nonce
    assert exited.detail.endswith("bye\n\nexit code 0")


async def test_the_workers_order_is_for_its_owner_alone(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "(folder / 'modes').write_text(f'{os.stat(order).st_mode} {os.stat(folder).st_mode}')"
    await pilot(relay, scratch, script, monkeypatch).run()
    modes = [stat.S_IMODE(int(each)) for each in (scratch / "modes").read_text().split()]
    assert modes == [0o600, 0o700]


async def test_a_worker_that_dies_is_started_again(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "number == 1 and os.kill(os.getpid(), 9)"
    assert await pilot(relay, scratch, script, monkeypatch).run() == "drained"
    first, second = starts(scratch)
    assert first["nonce"] != second["nonce"]
    await wait_until_async(lambda: len(relay.reports("worker_exited")) == 2, WAIT_S, "reports")
    assert relay.reports("worker_exited")[0].nonce == first["nonce"]
    assert relay.reports("worker_exited")[0].detail.endswith("killed by signal 9")


async def test_a_worker_that_is_refused_is_not_started_again(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"sys.exit({int(WorkerExit.REFUSED)})"
    assert await pilot(relay, scratch, script, monkeypatch).run() == "refused by the relay"
    assert len(starts(scratch)) == 1


async def test_a_node_is_named_as_its_scheduler_names_it(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad nodes are excluded by that name; Slurm refuses a job that excludes one it does not know."""
    one = pilot(relay, scratch, "", monkeypatch)
    await one.run()
    one = pilot(relay, scratch, "", monkeypatch, SLURMD_NODENAME="a6000-0")
    await one.run()
    assert [each["node"] for each in relay.joins] == [os.uname().nodename, "a6000-0"]


async def test_a_warning_is_no_end_where_the_end_is_known(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = str(int(SystemClock().wall()) + 150)
    one = pilot(relay, scratch, "", monkeypatch, SLURM_JOB_END_TIME=end)
    one.signalled(signal.SIGUSR2)
    assert not one.ending.begun
    one.signalled(signal.SIGTERM)
    assert one.ending.begun


async def test_a_signal_drains_the_worker(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(folder / "ready").touch()
signal.pause()
"""
    one = pilot(relay, scratch, script, monkeypatch)
    running = asyncio.create_task(one.run())
    await wait_until_async((scratch / "ready").exists, WAIT_S, "the worker runs")
    one.signalled(signal.SIGTERM)
    assert await running == SIGNALLED
    assert len(starts(scratch)) == 1


async def test_a_signal_before_the_worker_starts(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pilot(relay, scratch, "", monkeypatch)
    one.signalled(signal.SIGUSR2)
    assert await one.run() == WALLTIME
    assert starts(scratch) == []


async def test_a_signal_while_the_relay_is_away(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay.answers = [503] * 1000
    one = pilot(relay, scratch, "", monkeypatch)
    running = asyncio.create_task(one.run())
    await wait_until_async(lambda: relay.joins, WAIT_S, "it tries to join")
    one.signalled(signal.SIGTERM)
    assert await asyncio.wait_for(running, WAIT_S) == SIGNALLED
    assert starts(scratch) == []


async def test_a_signal_while_the_worker_is_to_be_started_again(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = pilot(relay, scratch, "sys.exit(5)", monkeypatch)
    running = asyncio.create_task(one.run())
    await started(scratch, 3)
    one.signalled(signal.SIGTERM)
    assert await running == SIGNALLED


async def test_a_line_of_any_length_is_read(
    relay: FakeRelay,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = "print('x' * 1_000_000); print('the last words')"
    assert await pilot(relay, scratch, script, monkeypatch).run() == "drained"
    assert capsys.readouterr().out.count("x") >= 1_000_000
    await wait_until_async(lambda: relay.reports("worker_exited"), WAIT_S, "the report")
    detail = relay.reports("worker_exited")[0].detail
    assert len(detail) <= 8000
    assert "the last words" in detail


async def test_a_revoked_pilot_ends_its_worker(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
(folder / "ready").touch()
signal.pause()
"""
    running = asyncio.create_task(pilot(relay, scratch, script, monkeypatch).run())
    await wait_until_async((scratch / "ready").exists, WAIT_S, "the worker runs")
    refused = m.Refused(code="not_authenticated", detail="this key was revoked")
    relay.router.send(relay.routes[0], codec.encode(refused))
    assert await running == REFUSED
    assert len(starts(scratch)) == 1


async def test_a_relay_that_forgot_the_pilot_is_greeted_again(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"
    one = pilot(relay, scratch, script, monkeypatch)
    running = asyncio.create_task(one.run())
    await wait_until_async(lambda: relay.routes, WAIT_S, "the pilot says hello")
    unknown = m.Refused(code="unknown_session")
    relay.router.send(relay.routes[0], codec.encode(unknown))
    hellos = lambda: [each for each in relay.heard if isinstance(each, m.Hello)]  # noqa: E731
    await wait_until_async(lambda: len(hellos()) == 2, WAIT_S, "a second hello")
    await started(scratch)
    one.signalled(signal.SIGTERM)
    await running


async def test_joining_is_tried_again_while_the_relay_is_away(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relay.answers = [503, 500]
    assert await pilot(relay, scratch, "", monkeypatch).run() == "drained"
    assert len(relay.joins) == 3
    assert len({each["worker_key"] for each in relay.joins}) == 1, "with the same keys"


@pytest.mark.parametrize(("status", "words"), [(401, 0), (404, 1)])
async def test_a_join_that_is_refused_is_final(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: int
) -> None:
    """A token that is not good any more may be one too many: then nobody is to hear of it under the good one's name."""
    relay.answers = [status]
    one = pilot(relay, scratch, "", monkeypatch)
    state_dir = scratch.parent / "state"
    (state_dir / one.order.name).mkdir(parents=True)
    one.order = msgspec.structs.replace(one.order, folder=str(state_dir / one.order.name))
    with pytest.raises((LaunchError, NotAuthenticated), match=f"HTTP {status}"):
        await one.run()
    assert len(relay.joins) == 1
    assert starts(scratch) == []
    assert len(find_words(state_dir)) == words


@pytest.mark.parametrize(
    ("where", "why"),
    [("file/x", "no scratch at"), ("$NOT_SET_HERE/x", "names a variable that is not set")],
)
async def test_why_it_never_joined_is_left_for_a_launcher(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch, where: str, why: str
) -> None:
    one = pilot(relay, scratch, "", monkeypatch)
    state_dir = scratch.parent / "state"
    folder = state_dir / one.order.name
    folder.mkdir(parents=True)
    (scratch.parent / "file").touch()
    one.order = msgspec.structs.replace(
        one.order, folder=str(folder), scratch=str(scratch.parent / where)
    )
    with pytest.raises(LaunchError, match=why):
        await one.run()
    (words,) = find_words(state_dir)
    assert words.name == one.order.name
    assert why in words.detail
    assert relay.joins == []


async def test_a_file_that_cannot_be_written_is_the_cause(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (scratch / "worker.order").mkdir(parents=True)  # it cannot be written
    with pytest.raises(OSError, match=r"worker\.order"):
        await pilot(relay, scratch, "", monkeypatch).run()
    await wait_until_async(
        lambda: any(isinstance(each, m.Goodbye) for each in relay.heard), WAIT_S, "its goodbye"
    )
    assert "worker.order" in next(e for e in relay.heard if isinstance(e, m.Goodbye)).cause
    assert "worker.order" in json.loads((scratch / "exit.json").read_text())["cause"]


def test_a_pilot_without_a_usable_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "order"
    write_order(
        path, PilotOrder(name="n", relay_url="http://127.0.0.1:9", join_token="t", scratch="s")
    )
    path.chmod(0o644)
    assert main(["pilot", str(path)]) == 1
    assert "others may read it" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
async def test_each_signal_of_a_scheduler_means_drain(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    script = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
(folder / "ready").touch()
signal.pause()
"""
    order = scratch.parent / "pilot.order"
    write_order(order, pilot(relay, scratch, script, monkeypatch).order)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edif_hpc.pilot.app", str(order), start_new_session=True
    )
    await wait_until_async((scratch / "ready").exists, WAIT_S, "the worker runs")
    assert not order.exists(), "the join token is for one use"
    process.send_signal(number)
    assert await asyncio.wait_for(process.wait(), WAIT_S) == 0
    warning = number in {signal.SIGUSR1, signal.SIGUSR2}
    cause = json.loads((scratch / "exit.json").read_text())["cause"]
    assert cause == (WALLTIME if warning else SIGNALLED)


async def test_a_killed_pilot_takes_its_worker_along(
    relay: FakeRelay, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel sends the worker SIGTERM, which is a drain."""
    script = """
from edif_hpc.worker.app import _follow
signal.signal(signal.SIGTERM, lambda *_: (folder / "drained").touch() or sys.exit(0))
_follow(int(pilot))
(folder / "ready").touch()
signal.pause()
"""
    order = scratch.parent / "pilot.order"
    write_order(order, pilot(relay, scratch, script, monkeypatch).order)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "edif_hpc.pilot.app", str(order), start_new_session=True
    )
    await wait_until_async((scratch / "ready").exists, WAIT_S, "the worker runs")
    process.kill()
    await process.wait()
    await wait_until_async((scratch / "drained").exists, WAIT_S, "the worker drains")
