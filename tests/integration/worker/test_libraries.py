"""Python is not restricted: what the image has works in a request, and what the level forbids is said in words.

What a level is said to allow (`domain.levels`) is tried here, rule by rule, by a request at that level.
"""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import nnsight
import pandas as pd
import pytest
import torch

from edif_hpc.domain.levels import RULES, Level, Verdict, rule
from edif_hpc.worker.engine.values import FailureKind
from tests.integration.worker.conftest import Service

#: Rules that other tests are about: test_weights and test_outcomes.
ELSEWHERE = {"weights", "limits"}


def on_activations(model: Any, **where: Any) -> None:
    with model.trace("Hello there my friend", **where):
        import einops
        import numpy as np
        import pandas as pd
        from sklearn.decomposition import PCA
        from sklearn.linear_model import LogisticRegression

        hidden = model.transformer.h[0].output
        hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).detach()
        turned = nnsight.save(einops.rearrange(hidden, "... s d -> ... d s"))
        rows = hidden.reshape(-1, hidden.shape[-1]).double().numpy()
        labels = np.arange(len(rows)) % 2
        components = nnsight.save(PCA(n_components=2, svd_solver="full").fit_transform(rows))
        weights = nnsight.save(LogisticRegression().fit(rows, labels).coef_)
        frame = nnsight.save(pd.DataFrame(rows[:, :2], columns=["a", "b"]).assign(label=labels))
        norms = nnsight.save(np.linalg.norm(rows, axis=1))


async def test_the_usual_libraries_work_on_activations(walled: Service) -> None:
    values = (await walled.send(on_activations)).values
    assert values["turned"].shape[-1] == len(values["frame"])
    assert isinstance(values["frame"], pd.DataFrame)
    assert list(values["frame"].columns) == ["a", "b", "label"]
    rows = values["turned"].movedim(-1, -2).reshape(len(values["frame"]), -1)
    assert values["norms"] == pytest.approx(rows.double().norm(dim=1).numpy())
    assert values["components"].shape == (len(rows), 2)
    assert values["weights"].shape == (1, rows.shape[1])


def at_once(model: Any, **where: Any) -> None:
    with model.session(**where):
        import math
        from concurrent.futures import ThreadPoolExecutor

        import datasets
        from joblib import Parallel, delayed

        with ThreadPoolExecutor(4) as pool:
            threads = nnsight.save(list(pool.map(math.sqrt, range(4))))
        jobs = nnsight.save(Parallel(n_jobs=2)(delayed(math.sqrt)(i) for i in range(4)))
        made = datasets.Dataset.from_dict({"text": ["a", "bb"]})
        counted = nnsight.save(made.map(lambda row: {"n": len(row["text"])})["n"][:])


async def test_pools_jobs_and_data_sets_work_at_every_level(walled: Service) -> None:
    """Where processes are not allowed, joblib runs its jobs one after the other, without a word."""
    reply = await walled.send(at_once)
    values = reply.values
    assert values["threads"] == values["jobs"] == [0.0, 1.0, 2**0.5, 3**0.5]
    assert values["counted"] == [1, 2]
    assert not [line for line in reply.printed if "Warning" in line]


def with_processes(model: Any, **where: Any) -> None:
    with model.session(**where):
        import math
        import multiprocessing
        import subprocess
        from concurrent.futures import ProcessPoolExecutor

        import torch

        with multiprocessing.Pool(2) as pool:
            pooled = nnsight.save(pool.map(math.sqrt, range(4)))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            spawned = nnsight.save(pool.map(math.sqrt, range(4)))
        with ProcessPoolExecutor(2) as pool:
            futures = nnsight.save(list(pool.map(math.sqrt, range(4))))
        loader = torch.utils.data.DataLoader(torch.arange(8), batch_size=4, num_workers=2)
        batches = nnsight.save(list(loader))
        sleeper = subprocess.Popen(["sleep", "600"])
        sleeper.terminate()
        status = nnsight.save(sleeper.wait())


async def test_child_processes_are_what_the_level_says(walled: Service) -> None:
    level, reply = walled.info.isolation.level, await walled.send(with_processes)
    if level is Level.FULL:
        values = reply.values
        assert (
            values["pooled"]
            == values["spawned"]
            == values["futures"]
            == [0.0, 1.0, 2**0.5, 3**0.5]
        )
        assert torch.equal(torch.cat(values["batches"]), torch.arange(8))
        assert values["status"] == -15
    else:
        assert reply.failed.kind is FailureKind.USER
        assert reply.failed.message.endswith(f"{rule('processes').instead}.")
        assert f"At level {level} of isolation" in reply.failed.message


def with_a_program(model: Any, **where: Any) -> None:
    with model.session(**where):
        import subprocess

        said = nnsight.save(subprocess.run(["echo", "x"], capture_output=True, check=True).stdout)


def with_a_manager(model: Any, **where: Any) -> None:
    with model.session(**where):
        import multiprocessing

        with multiprocessing.Manager() as manager:
            shared = nnsight.save(list(manager.list([1])))


def with_a_socket(model: Any, **where: Any) -> None:
    with model.session(**where):
        import urllib.request

        page = nnsight.save(urllib.request.urlopen("http://127.0.0.1:9/").status)


@pytest.mark.parametrize(
    ("block", "name"),
    [(with_a_program, "processes"), (with_a_manager, "network"), (with_a_socket, "network")],
    ids=["program", "manager", "socket"],
)
async def test_an_error_that_a_wall_caused_says_so(
    walled: Service, block: Any, name: str, store: Path
) -> None:
    reply, level = await walled.send(block), walled.info.isolation.level
    if rule(name).verdicts[level] is Verdict.YES:
        assert reply.values["said"] == b"x\n"
        return
    if block is with_a_manager and level is not Level.FULL:
        name = "processes"  # a manager is one, and it does not come to its socket
    assert f"a request cannot {rule(name).what}" in reply.failed.message
    assert name != "network" or str(store) in reply.failed.message


def from_a_hub(model: Any, **where: Any) -> None:
    with model.session(**where):
        import datasets

        data = nnsight.save(len(datasets.load_dataset("some/where")))


async def test_a_hub_is_refused_at_once_and_the_store_named(walled: Service, store: Path) -> None:
    reply = await walled.send(from_a_hub)
    assert str(store) in reply.failed.message
    assert not [line for line in reply.printed if "Retry" in line], "it does not try for minutes"


async def test_an_honest_mistake_gets_no_advice(walled: Service) -> None:
    def mistaken(model: Any, **where: Any) -> None:
        with model.session(**where):
            raise PermissionError(1, "mine")

    message = (await walled.send(mistaken)).failed.message
    assert "PermissionError" in message
    assert "of isolation" not in message


def listed(folder: str) -> list[str]:
    return sorted(each.name for each in Path(folder).iterdir())


@pytest.fixture(scope="module")
def reviews(store: Path) -> str:
    """A data set in the store, which an operator has put there."""
    import datasets

    place = str(store / "reviews")
    datasets.Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}).save_to_disk(place)
    return place


async def test_a_data_set_is_read_from_a_store(walled: Service, reviews: str) -> None:
    """What is made of it lies elsewhere: the store is not written, even where that would be possible."""
    before = listed(reviews)
    place = reviews

    def reading(model: Any, **where: Any) -> None:
        with model.session(**where):
            import datasets

            data = datasets.load_from_disk(place)
            labels = nnsight.save(data["label"][:])
            long = nnsight.save(data.filter(lambda row: len(row["text"]) > 3)["text"][:])

    values = (await walled.send(reading)).values
    assert (values["labels"], values["long"]) == ([1, 0], ["good"])
    assert listed(reviews) == before


async def test_a_library_comes_after_what_is_installed(walled: Service, library: Path) -> None:
    def importing(model: Any, **where: Any) -> None:
        with model.session(**where):
            import sys

            import einops
            import our_probes

            own = nnsight.save([our_probes.__version__, our_probes.__file__])
            other = nnsight.save(einops.__version__)
            path = nnsight.save(sys.path)

    values = (await walled.send(importing)).values
    assert values["own"] == ["1.2.3", str(library / "our_probes/__init__.py")]
    assert values["path"][-1] == str(library)
    packages = walled.info.packages
    assert packages["our_probes"] == "1.2.3"
    assert values["other"] == packages["einops"] != "0.0.1"
    assert walled.info.libraries == [str(library)]


async def test_files_of_its_own_are_as_usual(walled: Service) -> None:
    """What libraries do with files: none of it is a reason to refuse."""

    def working(model: Any, **where: Any) -> None:
        with model.session(**where):
            import shutil
            import sqlite3
            import tempfile
            from pathlib import Path

            import numpy as np

            Path("new").touch()
            Path("new").touch()
            Path("a/b").mkdir(parents=True)
            Path("a/b/text").write_text("x")
            shutil.copy2("a/b/text", "copied")
            shutil.copytree("a", "c")
            Path("copied").rename("moved")
            Path("link").symlink_to("moved")
            np.savez("arrays.npz", x=np.arange(3))
            total = nnsight.save(int(np.load("arrays.npz")["x"].sum()))
            with tempfile.NamedTemporaryFile("w+") as file:
                file.write("y")
            with sqlite3.connect("db") as db:
                db.execute("create table t (x)")
            shutil.rmtree("a")
            left = nnsight.save(
                sorted(each.name for each in Path().iterdir() if each.name[0] != ".")
            )

    values = (await walled.send(working)).values
    assert values["left"] == ["arrays.npz", "c", "db", "link", "moved", "new"]
    assert values["total"] == 3


def by_the_rules(store: str, library: str, secret: str, zygote: int) -> Any:
    """A block that tries what each rule is about, and returns how it went: yes, no, or an unexpected error."""
    refused = (errno.EPERM, errno.EACCES, errno.EROFS, errno.ESRCH)

    def block(model: Any, **where: Any) -> None:
        with model.session(**where):
            import ctypes
            import os
            import socket
            import subprocess
            import tempfile
            import threading
            from pathlib import Path

            def spaces() -> None:
                if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) < 0:
                    raise OSError(ctypes.get_errno(), "unshare")

            def thread() -> None:
                one = threading.Thread(target=lambda: None)
                one.start()
                one.join()

            attempts = {
                "import": lambda: __import__("pandas"),
                "threads": thread,
                "processes": lambda: subprocess.run(["true"], check=True),
                "network": lambda: socket.socket().close(),
                "stores": lambda: list(Path(store).iterdir()),
                "read": lambda: Path(secret).read_text(),
                "scratch": lambda: (Path(tempfile.mkdtemp()) / "mine").write_text("x"),
                "write": lambda: Path(store, "left").write_text("x"),
                "write library": lambda: Path(library, "left.py").write_text("x"),
                "others": lambda: os.kill(zygote, 0),
                "kernel": spaces,
                "devices": lambda: os.close(os.open("/dev/ptmx", os.O_RDWR)),
            }
            seen = nnsight.save({})
            for name, attempt in attempts.items():
                try:
                    attempt()
                    seen[name] = "yes"
                except OSError as error:
                    seen[name] = "no" if error.errno in refused else repr(error)

    return block


async def test_a_level_is_what_it_is_told_to_be(
    walled: Service, store: Path, library: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of another")
    zygote = walled.engine._zygote.process.pid
    block = by_the_rules(str(store), str(library), str(secret), zygote)
    seen = (await walled.send(block)).values["seen"]
    (store / "left").unlink(missing_ok=True)
    (library / "left.py").unlink(missing_ok=True)
    level = walled.info.isolation.level
    told = {
        each.name: str(each.verdicts[level])
        for each in RULES
        if each.name not in ELSEWHERE and each.verdicts[level] is not Verdict.OPEN
    }
    assert {name: seen[name] for name in told} == told
    assert {each.name for each in RULES} - ELSEWHERE <= seen.keys(), "each rule is tried"
    if level is not Level.PROCESS:
        assert seen["write library"] == "no"


async def test_shared_memory_is_the_executors_own(walled: Service) -> None:
    """At `full` it lies in the executor's folder: nothing is left for another, and the node's is not filled."""

    def leaving(model: Any, **where: Any) -> None:
        with model.session(**where):
            from pathlib import Path

            found = nnsight.save([])
            try:
                found += [each.name for each in Path("/dev/shm").iterdir()]
                Path("/dev/shm/edif-left").write_bytes(b"x")
            except OSError as error:
                found += [type(error).__name__]

    expected = {Level.FULL: [], Level.NO_NAMESPACES: ["PermissionError"]}
    level = walled.info.isolation.level
    for _ in range(2 if level in expected else 0):
        assert (await walled.send(leaving)).values["found"] == expected[level]
    assert "edif-left" not in listed("/dev/shm")
