"""A worker in a real container, run by an ordinary user: it serves, is walled in, ends in order, and tells no secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from edif_hpc.pilot.ending import CUT_SHORT, SIGNALLED
from edif_hpc.slurm.order import ContainerOrder, Route, read_worker_order
from edif_hpc.store.sqlite import SqliteStore
from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.node import serve_connect
from edif_hpc.testing.pilots import give
from edif_hpc.testing.processes import Process
from edif_hpc.testing.stack import Allocation, Stack
from edif_hpc.testing.wait import wait_until
from tests.integration.apptainer.conftest import HUB_TOKEN

WAIT_S = 60.0
PROLOGUE = """
from nnsight import TransformersModel
model = TransformersModel("edif/tiny-gpt2", task="text-generation")
"""
TRACE = """
with model.trace("The container is", remote=True):
    hidden = model.transformer.h[1].output[0].save()
report(shape=list(hidden.shape))
"""
FROM_STORE = """
import nnsight
store = {store!r}
with model.session(remote=True):
    import datasets, einops, pandas
    from pathlib import Path
    from sklearn.decomposition import PCA
    table = pandas.read_csv(f"{{store}}/numbers.csv")
    shape = nnsight.save(PCA(n_components=1).fit_transform(table).shape)
    total = nnsight.save(sum(datasets.Dataset.from_pandas(table)["b"]))
    error = nnsight.save("none")
    try:
        Path(store, "left").touch()
    except OSError as denied:
        error = nnsight.save(type(denied).__name__)
report(shape=list(shape), total=total, error=error)
"""
LARGE_TRACE = """
import torch
with model.trace("The result is", remote=True):
    large = torch.zeros(600_000).save()
report(count=len(large))
"""


def record(allocation: Allocation) -> dict[str, str]:
    return json.loads((allocation.folder / "scratch" / "exit.json").read_text())


def booked_cause(stack: Stack, allocation: Allocation) -> str | None:
    """What the relay, which is stopped, has in its books."""
    store = SqliteStore(stack.data_dir / "queue.sqlite")
    store.open()
    try:
        (mine,) = [each for each in store.allocations(live_only=False) if each.id == allocation.id]
    finally:
        store.close()
    return mine.cause


def the(kind: str, stack: Stack) -> Process:
    (found,) = stack.processes(kind)
    return found


def session_of(session: int) -> list[str]:
    """The programs of a session; zombies are none."""
    listed = ["ps", "-e", "-o", "sess=,stat=,comm="]
    lines = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    found = [line.split(None, 2) for line in lines]
    return [
        program for number, state, program in found if int(number) == session and state[0] != "Z"
    ]


def gone(stack: Stack) -> bool:
    return all(each.kind in {"relay", "client"} for each in stack.processes())


def test_it_serves_and_drains(stack: Stack, tmp_path: Path) -> None:
    (allocation,) = stack.launch(slots=1)
    stack.wait_warm()
    (line,) = stack.operator.get("/ps")["processes"]
    assert line["worker"]["isolation"] == "full", "an ordinary user's container allows every wall"
    with ClientProcess(stack.client_environ(stack.token("ada")), tmp_path / "client") as client:
        client.run(PROLOGUE)
        assert client.run(TRACE)["shape"][-1] == 64
        told = client.run(FROM_STORE.format(store=stack.engine.stores[0]))
    assert (told["shape"], told["total"]) == ([2, 1], 7), "the image has what researchers import"
    assert told["error"] in {"PermissionError", "OSError"}
    assert [each.name for each in Path(stack.engine.stores[0]).iterdir()] == ["numbers.csv"]

    worker = Path(f"/proc/{the('worker', stack).pid}")
    assert (worker / "ns/pid").readlink() != Path("/proc/self/ns/pid").readlink()
    assert worker.stat().st_uid != 0 or stack.user is None
    assert allocation.pilot is not None
    allocation.pilot.send_signal(signal.SIGTERM)
    wait_until(lambda: gone(stack), WAIT_S, "the container has drained")
    assert allocation.pilot.wait() == 0
    assert (record(allocation)["cause"], record(allocation)["worker_starts"]) == (SIGNALLED, 1)
    assert record(allocation)["requests"] == 2


def test_the_pilots_way_out_is_the_containers(stack: Stack, tmp_path: Path) -> None:
    """The model, the request and a large result go through a proxy: the container shares the node's network."""
    with serve_connect("127.0.0.1", tmp_path) as proxy:
        stack.route = Route(kind="connect", proxy=proxy.address)
        stack.launch(slots=1)
        stack.wait_warm()
        with ClientProcess(
            stack.client_environ(stack.token("ada")), tmp_path / "client"
        ) as client:
            client.run(PROLOGUE)
            assert client.run(LARGE_TRACE)["count"] == 600_000
        asked = (tmp_path / "tinyproxy-events.log").read_text()
        hub = stack.hub.removeprefix("http://")
        for where in (hub, f"127.0.0.1:{stack.port}"):
            assert f"CONNECT {where} " in asked
        stack.drain()


@pytest.mark.parametrize("number", sorted(set(CUT_SHORT.values())))
def test_the_end_of_its_time_is_told_through_the_container(
    stack: Stack, number: signal.Signals
) -> None:
    (allocation,) = stack.launch(slots=1)
    stack.wait_warm()
    os.kill(os.getsid(the("worker", stack).pid), number)
    wait_until(lambda: gone(stack), WAIT_S, "the worker has left in order")
    assert allocation.pilot is not None
    assert allocation.pilot.wait() == 0
    assert (record(allocation)["cause"], record(allocation)["worker_starts"]) == ("drained", 1)


def test_no_secret_is_seen_from_outside(stack: Stack) -> None:
    """Neither by `ps` nor, had somebody the right, in an environment. Files with secrets are for their owner."""
    (allocation,) = stack.launch(slots=1)
    stack.wait_warm()
    scratch = allocation.folder / "scratch"
    order = read_worker_order(scratch / "worker.order")
    assert order.engine.hub_token == HUB_TOKEN
    secrets = [order.secret_key.encode(), HUB_TOKEN.encode()]
    looked_at = [each for each in stack.processes() if each.kind != "relay"]
    assert {"pilot", "worker", "zygote", "executor"} <= {each.kind for each in looked_at}
    for each in looked_at:
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{each.pid}/{name}").read_bytes()
            assert not [one for one in secrets if one in content], (each.kind, name)
    for name in ("worker.order", "worker.env"):
        assert (scratch / name).stat().st_mode & 0o777 == 0o600
        holds = [one for one in secrets if one in (scratch / name).read_bytes()]
        assert bool(holds) == (name == "worker.order")


@pytest.mark.parametrize("victim", ["the worker", "its container"])
def test_what_is_killed_is_started_again_and_leaves_nothing(stack: Stack, victim: str) -> None:
    (allocation,) = stack.launch(slots=1)
    stack.wait_warm()
    worker = the("worker", stack)
    session = os.getsid(worker.pid)  # that of apptainer, which the pilot started
    programs = session_of(session)
    assert "squashfuse_ll" in programs, "what serves the image's files names no folder of ours"
    if victim == "the worker":
        worker.kill()
    else:
        os.kill(session, signal.SIGKILL)
    wait_until(lambda: not session_of(session), WAIT_S, "all that was started with it is gone")
    wait_until(lambda: stack.processes("worker"), WAIT_S, "another worker")
    stack.wait_warm()
    assert allocation.pilot is not None
    assert allocation.pilot.poll() is None


def test_a_killed_pilot_takes_its_container_along(stack: Stack) -> None:
    (allocation,) = stack.launch(slots=1)
    stack.wait_warm()
    assert allocation.pilot is not None
    allocation.pilot.kill()
    allocation.pilot.wait()
    wait_until(lambda: gone(stack), WAIT_S, "the container has drained")
    stack.bury(allocation)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"sha256": "a" * 64}, "wrong image: worker-cpu-"),
        ({"image": "/nowhere/worker.sif"}, "the image /nowhere/worker.sif cannot be read"),
        ({"apptainer": "/nowhere/apptainer"}, "/nowhere/apptainer cannot be started"),
    ],
)
def test_what_cannot_be_run_ends_with_its_cause(
    stack: Stack, change: dict[str, str], cause: str
) -> None:
    assert stack.container is not None
    stack.container = msgspec.structs.replace(stack.container, **change)
    (allocation,) = stack.launch(slots=1)
    assert allocation.pilot is not None
    assert allocation.pilot.wait(WAIT_S) == 1
    assert record(allocation)["cause"].startswith(cause)
    stack.stop_relay()
    assert str(booked_cause(stack, allocation)).startswith(cause)


def test_the_copy_is_shared_by_allocations(stack: Stack, public: Path) -> None:
    """Two pilots of one user on one node; the second finds what the first has brought."""
    copies = public / "copies"
    copies.mkdir(mode=0o777)  # the umask makes 755 of it; the pilot's user is its owner
    if stack.user is not None:
        give(copies, stack.user)
    assert isinstance(stack.container, ContainerOrder)
    stack.container = msgspec.structs.replace(stack.container, copies=str(copies))
    assert len(stack.launch()) == 2
    stack.wait_warm(count=2)
    assert len(list(copies.glob("*.sif"))) == 1
    assert not list(stack.root.rglob("scratch/images"))
