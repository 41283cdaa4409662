"""What a probe finds on a node, each thing there and not there. What it finds on real nodes is for the acceptance tests."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edif_hpc.slurm.finding import Finding
from edif_hpc.slurm.order import EngineFacts, ForwardFile, write_forward
from edif_hpc.slurm.probe import ProbeOrder, look_around, read_probed, write_probe_order
from edif_hpc.slurm.site import Container, Gpu, Site
from edif_hpc.testing.fake_slurm.cluster import FakeSlurm, fake_slurm

GREETING = b"\xff" + bytes(8) + b"\x7f"


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSlurm]:
    """A fake cluster whose programs a node has."""
    with fake_slurm(tmp_path / "slurm") as fake:
        for name, value in fake.environ.items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def looked(slurm: FakeSlurm, tmp_path: Path) -> Callable[..., dict[str, Finding]]:
    """Look around at a site that differs in some facts; the checks by name."""
    folder = tmp_path / "edif-probe-a6000-1"
    folder.mkdir(mode=0o700)
    (tmp_path / "state").mkdir(mode=0o700)

    def look(
        *urls: str, environ: dict[str, str] | None = None, **facts: Any
    ) -> dict[str, Finding]:
        gpu = msgspec.structs.replace(
            slurm.site().gpus["a6000"], vendor=facts.pop("vendor", "none")
        )
        plain = {"scratch": str(tmp_path / "scratch"), "state_dir": tmp_path / "state"}
        site = msgspec.structs.replace(slurm.site(), gpus={"a6000": gpu}, **(plain | facts))
        order = ProbeOrder(site=site, gpu="a6000", urls=urls)
        return {each.what: each for each in look_around(order, folder, environ or {}).findings}

    return look


@contextmanager
def listening(greeting: bytes) -> Iterator[str]:
    """A server that says this to whoever connects; yields HOST:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    link, _ = server.accept()
                except OSError:  # it was closed
                    return
                with link, suppress(OSError):
                    link.sendall(greeting)
                    link.shutdown(socket.SHUT_WR)
                    link.recv(4096)  # closing at once would reset it, and lose what was said

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def test_a_relay_that_answers(looked: Callable[..., dict[str, Finding]]) -> None:
    with listening(GREETING) as zeromq, listening(b"HTTP/1.1 404 x\r\ncontent-length: 0\r\n\r\n") as http:  # fmt: skip
        found = looked(f"http://{http}", f"tcp://{zeromq}")
    assert found[f"reaches http://{http}"].grade == "OK"
    assert found[f"reaches tcp://{zeromq}"].grade == "OK"


def test_a_way_that_is_closed(looked: Callable[..., dict[str, Finding]]) -> None:
    found = looked("http://127.0.0.1:9", "tcp://127.0.0.1:9")
    for url in ("http://127.0.0.1:9", "tcp://127.0.0.1:9"):
        check = found[f"reaches {url}"]
        assert (check.grade, "refused" in check.seen.lower()) == ("FAIL", True)
        assert "`route`" in check.way_out


def test_a_firewall_that_accepts_and_is_no_relay(
    looked: Callable[..., dict[str, Finding]],
) -> None:
    with listening(b"SSH-2.0") as wrong:
        check = looked(f"tcp://{wrong}")[f"reaches tcp://{wrong}"]
    assert (check.grade, check.seen) == ("FAIL", "it accepts, and does not answer as ZeroMQ does")


PASSES = b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\n"
URLS = ("https://relay.example", "tcp://relay.example:8711")


def test_a_route_through_a_proxy(looked: Callable[..., dict[str, Finding]]) -> None:
    with listening(PASSES + GREETING) as proxy:
        found = looked(*URLS, route="connect", proxy=proxy)
    assert {found[f"reaches {url}"].grade for url in URLS} == {"OK"}
    with listening(b"HTTP/1.1 403 Forbidden\r\n\r\n") as proxy:
        found = looked(*URLS, route="connect", proxy=proxy)
    assert found["route connect"].grade == "OK"
    for url in URLS:
        assert "403 Forbidden" in found[f"reaches {url}"].seen
        assert "pass on to this port" in found[f"reaches {url}"].way_out
    with listening(b"") as silent:
        assert looked(*URLS, route="connect", proxy=silent)[f"reaches {URLS[0]}"].grade == "FAIL"


def test_of_a_socks_proxy_only_itself_is_looked_at(
    looked: Callable[..., dict[str, Finding]],
) -> None:
    assert looked(*URLS, route="socks", proxy="127.0.0.1:9")["route socks"].grade == "FAIL"
    with listening(b"") as proxy:
        found = looked(*URLS, route="socks", proxy=proxy)
    assert found["route socks"].grade == "OK"
    assert not any(what.startswith("reaches") for what in found)


def test_a_route_through_the_login_node(
    looked: Callable[..., dict[str, Finding]], tmp_path: Path
) -> None:
    check = looked(*URLS, route="login")["route login"]
    assert (check.grade, check.way_out) == ("FAIL", "start it on a login node: edif-hpc launcher forward")  # fmt: skip
    with listening(PASSES + GREETING) as forwarder:
        told = ForwardFile(address=forwarder, secret="s")
        write_forward(tmp_path / "state" / "forward.json", told)
        found = looked(*URLS, route="login")
    assert {found[f"reaches {url}"].grade for url in URLS} == {"OK"}


def test_a_node_without_the_driver(looked: Callable[..., dict[str, Finding]]) -> None:
    check = looked(vendor="amd")["GPU"]
    assert check.grade == "FAIL"
    assert "/dev/kfd" in check.seen


def test_a_scratch(looked: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    assert str(tmp_path / "scratch") in looked()["scratch"].seen
    assert list((tmp_path / "scratch").iterdir()) == [], "what was written is gone"
    assert "names a variable that is not set" in looked(scratch="$NOT_SET_HERE/x")["scratch"].seen
    assert looked(scratch="/proc/x")["scratch"].grade == "FAIL"
    assert "memory" in looked(scratch="/dev/shm")["scratch"].way_out


def test_containers(looked: Callable[..., dict[str, Finding]], tmp_path: Path) -> None:
    program = tmp_path / "apptainer"
    facts = {"apptainer": str(program), "image": str(tmp_path / "worker.sif")}
    assert looked(container=Container(**facts))["apptainer"].grade == "FAIL"
    program.write_text('#!/bin/sh\n[ "$1" = --version ] && echo apptainer version 1.4.5 && exit\necho "FATAL: no userns" >&2\nexit 255\n')  # fmt: skip
    program.chmod(0o755)
    found = looked(container=Container(**facts))
    assert found["apptainer"].seen == "apptainer version 1.4.5"
    assert "cannot be read on this node" in found["image"].seen
    (tmp_path / "worker.sif").touch()
    check = looked(container=Container(**facts))["image"]
    assert (check.grade, check.seen) == ("FAIL", f"{tmp_path / 'worker.sif'}: FATAL: no userns")
    program.write_text("#!/bin/sh\necho 0.0.1\n")
    check = looked(container=Container(**facts))["image"]
    assert (check.grade, check.way_out) == ("WARN", "build the image anew")


def test_the_level_is_found_by_the_python_of_the_worker(
    looked: Callable[..., dict[str, Finding]], tmp_path: Path
) -> None:
    """On the host by this one, for real; in an image by the image's, which may see less of the kernel."""
    check = looked()["isolation"]
    assert re.search(r"reaches (only )?level (full|no-namespaces|process)", check.seen)
    assert (check.grade == "OK") == ("only" not in check.seen)
    program, image = tmp_path / "apptainer", tmp_path / "worker.sif"
    image.touch()
    told = '{"level":"no-namespaces","missing":["full: unshare: Operation not permitted"]}'
    program.write_text(
        f"#!/bin/sh\ncase \"$*\" in *worker.reach*) echo '{told}';; *) echo 1;; esac\n"
    )
    program.chmod(0o755)
    check = looked(container=Container(apptainer=str(program), image=str(image)))["isolation"]
    assert (check.grade, check.seen) == (
        "WARN",
        "a worker here reaches only level no-namespaces (full: unshare: Operation not permitted)",
    )
    assert check.way_out is not None
    assert "read-a-level" in check.way_out


def test_stores_have_to_be_on_the_node(
    looked: Callable[..., dict[str, Finding]], tmp_path: Path
) -> None:
    store = tmp_path / "data"
    store.mkdir()
    engine = EngineFacts(stores=(str(store),), libraries=("/nowhere/python",))
    found = looked(engine=engine)
    assert (
        found[f"store {store}"].grade == "WARN"
    )  # this account may write it, and there is no image
    assert found["store /nowhere/python"].grade == "FAIL"


def test_sbatch_on_the_node(looked: Callable[..., dict[str, Finding]], slurm: FakeSlurm) -> None:
    assert "to start at" in looked()["sbatch from here"].seen
    slurm.stop_controller()
    assert looked()["sbatch from here"].way_out == "probe again later", (
        "it may work at other times"
    )


def test_a_node_where_sbatch_is_not(
    looked: Callable[..., dict[str, Finding]], slurm: FakeSlurm
) -> None:
    (slurm.root / "bin" / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Access/permission denied' >&2\nexit 1\n")  # fmt: skip
    check = looked()["sbatch from here"]
    assert (check.grade, "compute_may_submit = false" in check.way_out) == ("WARN", True)


def test_the_end_of_the_walltime(looked: Callable[..., dict[str, Finding]]) -> None:
    told = looked(environ={"SLURM_JOB_END_TIME": "1"})["end of the walltime"]
    assert told.seen == "told by SLURM_JOB_END_TIME"
    assert looked()["end of the walltime"].grade == "WARN"


def test_an_order_comes_back_as_it_was(slurm: FakeSlurm, tmp_path: Path) -> None:
    path = tmp_path / "order"
    write_probe_order(path, ProbeOrder(site=slurm.site(), gpu="a6000", urls=("tcp://x:1",)))
    assert path.stat().st_mode & 0o077 == 0
    read = msgspec.json.decode(path.read_bytes(), type=ProbeOrder, dec_hook=lambda as_, text: as_(text))  # fmt: skip
    assert isinstance(read.site, Site)
    assert isinstance(read.site.gpus["a6000"], Gpu)
    assert json.loads(path.read_bytes())["urls"] == ["tcp://x:1"]


def test_nothing_is_read_before_it_is_there(tmp_path: Path) -> None:
    assert read_probed(tmp_path / "probe.json") is None
