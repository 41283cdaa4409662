"""What goes wrong without a crash: a stopped relay, a full disk, damaged bytes, cut lines, a clock that jumps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.testing.audit import audit
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.proxy import Proxy
from edif_hpc.testing.raw_client import RawClient, Told
from edif_hpc.testing.stack import Stack, tail
from edif_hpc.testing.wait import wait_until

LEASE_S = 2.0
SETTINGS = {"lease_s": LEASE_S, "heartbeat_s": 0.25, "poll_hold_s": 0.1}


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A relay with a movable clock and one worker without a model."""
    with Stack(
        root=tmp_path_factory.mktemp("faults"), settings=SETTINGS, moved_clock=True, term_s=1.0
    ) as stack:
        stack.deploy()
        stack.launch(engine="noop")
        stack.wait_warm()
        yield stack
        wait_until(lambda: stack.operator.unfinished() == 0, 60, "everything has ended")
        stack.stop_relay()
        assert audit(stack.data_dir).faults == []
        stack.start_relay()


@pytest.fixture
def client(serving: Stack, request: pytest.FixtureRequest) -> RawClient:
    for each in [each for each in serving.allocations if each.over]:
        serving.bury(each)  # its workers died young too often, so its pilot has left
        serving.launch(engine="noop")
    serving.wait_warm()
    return serving.client(request.node.name[:60])


def download(link: str, into: bytearray) -> None:
    with httpx.stream("GET", link, timeout=60) as answer:
        for chunk in answer.iter_bytes():
            into += chunk


def attempts(stack: Stack, request_id: str) -> list[str | None]:
    """How each attempt of a request ended."""
    return [
        each["end"] for each in stack.operator.get(f"/requests/{request_id}/explain")["attempts"]
    ]


# -- time --------------------------------------------------------------------------------------------------------------


def test_a_relay_that_stood_still_for_two_leases_loses_none(
    serving: Stack, client: RawClient
) -> None:
    blob = Task(name="patient", seconds=3 * LEASE_S).blob()
    request_id = client.send(blob)
    wait_until(lambda: client.poll(request_id).status == "RUNNING", 30, "it runs")
    assert serving.relay is not None
    serving.relay.send_signal(signal.SIGSTOP)
    with pytest.raises(
        TimeoutError
    ):  # nothing can be awaited of a process that is stopped, but time
        wait_until(lambda: False, 2 * LEASE_S, "two leases pass")
    serving.relay.send_signal(signal.SIGCONT)
    end = client.ended(request_id)
    assert client.result(end) == result_of(blob)
    assert attempts(serving, request_id) == ["completed"]


def test_the_wall_clock_goes_back_an_hour(serving: Stack, client: RawClient) -> None:
    """Leases and graces are monotonic; links are signed by the same clock that checks them; nobody pays less than nothing."""
    before = Task(name="before", seconds=1.0).blob()
    first = client.send(before)
    wait_until(lambda: client.poll(first).status == "RUNNING", 30, "it runs")
    serving.clock_file.write_text("-3600")
    after = Task(name="after", result_bytes=2 << 20, padding="x" * 100_000).blob()
    second = client.send(after)
    ends = [client.ended(each) for each in (first, second)]
    assert [client.result(each) for each in ends] == [result_of(before), result_of(after)]
    assert [attempts(serving, each) for each in (first, second)] == [["completed"], ["completed"]]
    serving.clock_file.write_text("0")
    assert client.result(client.ended(second)) == result_of(after)


# -- bytes -------------------------------------------------------------------------------------------------------------


def test_a_blob_that_was_damaged_on_the_disk_is_not_run(serving: Stack, client: RawClient) -> None:
    blocker = client.send(Task(name="blocker", seconds=60).blob())
    wait_until(lambda: client.poll(blocker).status == "RUNNING", 30, "the worker is busy")
    [worker] = serving.processes("worker")
    worker.kill(signal.SIGSTOP)  # so that the blob lies there until it has been damaged
    request_id = client.send(Task(name="damaged", padding="x" * 200_000).blob())
    path = serving.data_dir / "blobs" / request_id
    data = bytearray(path.read_bytes())
    data[100_000] ^= 0xFF
    path.write_bytes(data)
    httpx.delete(f"{client.url}/api/requests/{blocker}", headers=client.headers)
    worker.kill(signal.SIGCONT)
    end = client.ended(request_id)
    assert (end.status, end.kind) == ("ERROR", "damaged")
    assert "send it again" in end.description


def test_a_large_download_is_cut_and_goes_on(serving: Stack, client: RawClient) -> None:
    blob = Task(name="large", result_bytes=100 << 20).blob()
    request_id = client.send(blob)
    client.ended(request_id)
    with Proxy(serving.port) as proxy:
        far = RawClient(url=proxy.url, token=client.token, model_key=client.model_key)
        link = str(far.ended(request_id).data)
        proxy.cut_after(50 << 20)
        got = bytearray()
        with pytest.raises(httpx.TransportError):
            download(link, got)
        assert 0 < len(got) < 100 << 20
        rest = httpx.get(link, headers={"range": f"bytes={len(got)}-"}, timeout=60)
    assert rest.status_code == httpx.codes.PARTIAL_CONTENT
    assert bytes(got) + rest.content == result_of(blob)


# -- a worker's death ----------------------------------------------------------------------------------------------------


def test_a_listening_client_sees_of_a_workers_death_a_status_line(
    serving: Stack, client: RawClient
) -> None:
    blob = Task(name="watched", seconds=1.0).blob()
    frames: list[Told] = []
    with client.subscribe() as session:
        request_id = session.send(blob)
        session.until(request_id, "RUNNING")
        [worker] = serving.processes("worker")
        worker.kill()
        while not (frames and frames[-1].ended):
            frames.append(session.next())
    assert frames[-1].data == result_of(blob)
    assert {each.id for each in frames} == {request_id}
    lines = [each.description for each in frames]
    assert any("; it runs again (the worker on " in line for line in lines), lines
    assert any("; attempt 2 (the worker on " in line for line in lines), lines
    assert [each for each in frames if each.ended] == frames[-1:]
    assert attempts(serving, request_id) == ["worker_lost", "completed"]


def test_a_request_that_kills_its_workers_is_quarantined(
    serving: Stack, client: RawClient
) -> None:
    """It kills so soon that its begin has been told, and not yet been stored."""
    end = client.ended(client.send(Task(name="poison", seconds=0.02, fails="worker").blob()))
    assert (end.status, end.kind) == ("ERROR", "crash")
    assert "quarantined: 2 workers died" in end.description
    assert attempts(serving, end.id)[-2:] == ["worker_lost", "worker_lost"]


def test_relay_and_worker_die_together(serving: Stack, client: RawClient) -> None:
    """Nobody presents the lease again, and nobody says that its holder is dead: it ends by itself."""
    blob = Task(name="orphan", seconds=1.0).blob()
    request_id = client.send(blob)
    wait_until(lambda: client.poll(request_id).status == "RUNNING", 30, "it runs")
    serving.kill_relay()
    [gone] = serving.allocations
    for each in serving.processes("pilot") + serving.processes("worker"):
        each.kill()
    serving.start_relay()
    serving.launch(engine="noop", slots=2)
    assert client.result(client.ended(request_id)) == result_of(blob)
    assert attempts(serving, request_id) == ["expired", "completed"]
    serving.bury(gone)


def test_what_a_preempted_allocation_runs_goes_on_elsewhere(
    serving: Stack, client: RawClient
) -> None:
    """It is given back before the node is taken, and counts against nobody."""
    blob = Task(name="preempted", seconds=4.0).blob()
    request_id = client.send(blob)
    wait_until(lambda: client.poll(request_id).status == "RUNNING", 30, "it runs")
    [gone] = serving.allocations
    [pilot] = serving.processes("pilot")
    os.kill(pilot.pid, signal.SIGTERM)
    wait_until(lambda: attempts(serving, request_id)[0], 30, "the lease ends")
    assert attempts(serving, request_id)[0] == "preempted"
    serving.bury(gone)
    serving.launch(engine="noop")
    assert client.result(client.ended(request_id)) == result_of(blob)
    record = json.loads((gone.folder / "scratch" / "exit.json").read_text())
    assert record["cause"].startswith("the scheduler ended it")


def test_a_worker_dies_while_it_uploads(serving: Stack, client: RawClient) -> None:
    with Proxy(serving.port) as thin:
        thin.upload_bytes_per_s = 8 << 20
        serving.stop_relay()
        serving.start_relay(worker_base_url=thin.url)
        serving.wait_warm()
        blob = Task(name="cut short", result_bytes=64 << 20).blob()
        request_id = client.send(blob)
        wait_until(lambda: thin.uploaded > 4 << 20, 60, "the upload is under way")
        [worker] = serving.processes("worker")
        worker.kill()
        thin.upload_bytes_per_s = None
        end = client.ended(request_id)
        assert client.result(end) == result_of(blob)
    assert attempts(serving, request_id) == ["worker_lost", "completed"]
    serving.stop_relay()
    serving.start_relay()


# -- disks -------------------------------------------------------------------------------------------------------------


def write_for_ever(file: int) -> None:
    while True:
        os.write(file, bytes(1 << 12))


class SmallDisk:
    """A file system of 8 MiB."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self._run("mount", "-t", "tmpfs", "-o", "size=8m,mode=700", "tmpfs")

    def fill(self) -> None:
        filler = os.open(self.folder / "filler", os.O_WRONLY | os.O_CREAT)
        try:
            with pytest.raises(OSError, match="No space left"):
                write_for_ever(filler)
        finally:
            os.close(filler)

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def close_to_writes(self) -> None:
        self._run("mount", "-o", "remount,ro")

    def open_to_writes(self) -> None:
        self._run("mount", "-o", "remount,rw")

    def remove(self) -> None:
        self._run("umount", "-l")

    def _run(self, *command: str) -> None:
        subprocess.run([*command, self.folder], check=True)


@pytest.fixture
def tight(tmp_path: Path) -> Iterator[tuple[Stack, SmallDisk]]:
    """A stack, and the small disk of its relay."""
    if os.geteuid() != 0:
        absent("only root may mount a small disk")
    root = tmp_path / "stack"
    disk = SmallDisk(root / "relay")
    try:
        with Stack(root=root, settings=SETTINGS) as stack:
            stack.deploy()
            yield stack, disk
            disk.open_to_writes()
            disk.free()
    finally:
        disk.remove()


def test_a_full_disk_refuses_and_recovers(tight: tuple[Stack, SmallDisk]) -> None:
    stack, disk = tight
    stack.launch(engine="noop")
    stack.wait_warm()
    client = stack.client()
    running = Task(name="running", seconds=1.0).blob()
    with client.subscribe() as session:
        request_id = session.send(running)
        session.until(request_id, "RUNNING")
        disk.fill()
        for blob in (Task(name="small").blob(), Task(name="large", padding="x" * 100_000).blob()):
            refused = client.post(blob)
            assert refused.status_code == httpx.codes.SERVICE_UNAVAILABLE
            assert "disk" in refused.json()["detail"]
            assert str(stack.data_dir) not in refused.text, "where it is, only the operator reads"
        log = stack.root / "relay.log"
        assert log.read_text().count(f"refused: {stack.data_dir}") == 2
        wait_until(lambda: "done_failed" in log.read_text(), 60, "a result finds no room")
        assert not client.poll(request_id).ended
        disk.free()
        assert session.ended(request_id).data == result_of(running)
    again = Task(name="again", padding="x" * 100_000).blob()
    assert client.result(client.ended(client.send(again))) == result_of(again)
    stack.stop_relay()
    assert audit(stack.data_dir).faults == []


def test_a_data_directory_that_cannot_be_written_is_named(tight: tuple[Stack, SmallDisk]) -> None:
    stack, disk = tight
    stack.stop_relay()
    disk.close_to_writes()
    stack.spawn_relay()
    assert stack.wait_relay() == 1
    said = tail(stack.root / "relay.log").strip().splitlines()[-1]
    assert str(stack.data_dir) in said
    assert "writable" in said
