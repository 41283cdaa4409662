"""Compute nodes that reach only the login node serve all the same, by every route; what passes breaks, and nothing is lost.

Pilot and worker are real processes in a network namespace, the relay is one outside, and so are the proxies between them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edif_hpc.slurm.order import RouteKind, read_forward
from edif_hpc.testing.absent import absent
from edif_hpc.testing.audit import audit
from edif_hpc.testing.debian import PartMissing
from edif_hpc.testing.load import Load
from edif_hpc.testing.node import Program, serve_connect, serve_socks
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.wait import wait_until
from edif_hpc.testing.work import NoopWork
from tests.integration.routes.conftest import Cluster

WAIT_S = 90.0
LARGE = 3 << 20


class Forwarder:
    """`edif-hpc launcher forward`, as `Program` has it; each start takes another port."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._log = cluster, cluster.stack.root / "forward.log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        where = [
            "--site",
            str(self._cluster.site_file),
            "--listen",
            f"{self._cluster.node.login}:0",
        ]
        command = [sys.executable, "-m", "edif_hpc.cli.main", "launcher", "forward", *where]
        before = self.log.count("forwarding from")
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._cluster.environ,
            )
        wait_until(lambda: self.log.count("forwarding from") > before, WAIT_S, "it forwards")

    def kill(self, number: int = signal.SIGKILL) -> int:
        if self.process is None:
            return 0
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)

    @property
    def log(self) -> str:
        return self._log.read_text() if self._log.exists() else ""


@contextmanager
def way(route: RouteKind, cluster: Cluster) -> Iterator[Program | Forwarder]:
    """Have the route: what it goes through runs, and the site's file tells of it."""
    if route == "login":
        cluster.describe(route)
        forwarder = Forwarder(cluster)
        try:
            forwarder.start()
            yield forwarder
        finally:
            forwarder.kill()
        return
    serve = serve_socks if route == "socks" else serve_connect
    try:
        with serve(cluster.node.login, cluster.stack.root) as proxy:
            cluster.describe(route, proxy.address)
            yield proxy
    except PartMissing as missing:
        absent(str(missing))


def sends_on(load: Load) -> None:
    """Wait until more is sent, so more has ended: each client waits for its end."""
    enough = len(load.right) + 8
    wait_until(lambda: len(load.right) >= enough, WAIT_S, "work goes on")


@pytest.mark.parametrize("route", ["socks", "connect", "login"])
def test_a_node_without_a_route_serves(cluster: Cluster, route: RouteKind) -> None:
    stack = cluster.stack
    with way(route, cluster) as between:
        cluster.up()
        stack.wait_warm(timeout_s=WAIT_S)
        client = stack.client()
        large = Task(name="large", padding="x" * 200_000, result_bytes=LARGE).blob()
        end = client.ended(client.send(large), WAIT_S)
        assert (end.status, client.result(end)) == ("COMPLETED", result_of(large))

        # A large result, with nothing to carry it away.
        waiting = Task(name="waiting", seconds=1.0, result_bytes=LARGE).blob()
        sent = client.send(waiting)
        wait_until(lambda: client.poll(sent).status == "RUNNING", WAIT_S, "it runs")
        between.kill()
        wait_until(lambda: "not passed on" in cluster.log, WAIT_S, "the pilot misses it")
        between.start()
        end = client.ended(sent, WAIT_S)
        assert (end.status, client.result(end)) == ("COMPLETED", result_of(waiting))

        load = Load(client, NoopWork(), clients=4, seed=7)
        load.start()
        for _ in range(3):
            sends_on(load)
            between.kill()
            between.start()
        sends_on(load)
        load.finish()
        assert load.faults == []
        cluster.drain()
        stack.stop_relay()
    books = audit(stack.data_dir, told=load.right, right=load.right)
    assert books.faults == []
    assert books.requests == books.completed == len(load.right) + 2
    (record,) = (
        json.loads(each.read_text()) for each in cluster.site.state_dir.glob("*/exit.json")
    )
    assert record["worker_starts"] == 1, "the worker did not die of it"


def test_without_a_route_the_way_out_is_named(cluster: Cluster) -> None:
    """In the pilot's log, and where the operator looks: the relay hears of it by the launcher."""
    cluster.describe("direct")
    cluster.jobs.join_s = 2.0
    cluster.up()
    (name, pilot), *_ = cluster.jobs.running.values()
    assert pilot.wait(WAIT_S) == 1
    words = f"the relay at {cluster.stack.url} cannot be reached from "
    assert cluster.log.count(words) >= 2, "one for each try"
    assert "the site's route is 'direct', see docs/howto/routes.md" in cluster.log
    cluster.round()
    slot = cluster.stack.operator.get("/slots/tiny/0")
    (ended,) = [each for each in slot["generations"] if each["name"] == name]
    assert ended["cause"] == "its pilot could not join"
    assert words in ended["detail"]
    assert list((cluster.site.state_dir / "unheard").iterdir()) == []


def test_the_forwarder_ends_in_order_and_keeps_quiet(cluster: Cluster) -> None:
    with way("login", cluster) as between:
        assert isinstance(between, Forwarder)
        secret = read_forward(cluster.site.forward_file).secret
        cluster.up()
        cluster.stack.wait_warm(timeout_s=WAIT_S)
        cluster.drain()
        assert between.kill(signal.SIGTERM) == 0
        assert not cluster.site.forward_file.exists()
        wait_until(lambda: " passed_on peer=" in between.log, WAIT_S, "each connection is logged")
        assert secret not in between.log + cluster.log


def test_the_launcher_forwards_too(cluster: Cluster, tmp_path: Path) -> None:
    """One process on the login node; it submits nothing here, for there is no Slurm."""
    cluster.describe("login")
    where = ["--site", str(cluster.site_file), "--forward", f"{cluster.node.login}:0"]
    command = [sys.executable, "-m", "edif_hpc.cli.main", "launcher", "run", *where]
    log = tmp_path / "launcher.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=cluster.environ)
    try:
        wait_until(cluster.site.forward_file.exists, WAIT_S, log.read_text)
        cluster.up()
        cluster.stack.wait_warm(timeout_s=WAIT_S)
        cluster.drain()
    finally:
        process.terminate()
        status = process.wait(WAIT_S)
    assert (status, cluster.site.forward_file.exists()) == (0, False)
