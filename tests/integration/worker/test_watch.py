"""Memory and files beyond their limits, by the ways that no limit of the kernel's covers."""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.testing.leaky_zygote import launching
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import Failed, FailureKind, Level, Limits
from tests.integration.worker.conftest import Service, serving, spec
from tests.integration.worker.test_fidelity import trace

MIB = 1 << 20
MEMORY = Limits(wall_s=120, memory_bytes=256 * MIB)
SCRATCH = Limits(wall_s=120, scratch_bytes=32 * MIB)
BELOW = (Level.FULL, Level.NO_NAMESPACES)


@pytest.fixture(scope="module", params=BELOW, ids=str)
async def walled(
    request: pytest.FixtureRequest,
    gpt2: Any,
    tiny_gpt2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Service]:
    """An engine at each level that has walls around files."""
    scratch = tmp_path_factory.mktemp("watched")
    async with serving(gpt2, tiny_gpt2, scratch, ceiling=request.param) as one:
        if one.info.isolation.level is not request.param:
            absent(f"not to be had here: {one.info.isolation.missing}")
        yield one


def mapping(model: Any, **where: Any) -> None:
    """Shared memory that is no private data of anybody."""
    with model.session(**where):
        import mmap
        import time

        kept = []
        for _ in range(16):
            one = mmap.mmap(-1, 64 << 20)
            for _ in range(64):  # in small pieces: these are private
                one.write(b"x" * (1 << 20))
            kept.append(one)
        while True:
            time.sleep(1)


def unmapping(model: Any, **where: Any) -> None:
    """Shared memory that is in no page table at the moment."""
    with model.session(**where):
        import mmap
        import time

        kept = []
        for _ in range(16):
            one = mmap.mmap(-1, 64 << 20)
            one.write(b"x" * (64 << 20))
            one.madvise(mmap.MADV_DONTNEED)
            kept.append(one)
        while True:
            time.sleep(1)


def bearing(model: Any, **where: Any) -> None:
    """Children, each within its limit, one of them without its first thread."""
    with model.session(**where):
        import ctypes
        import os
        import threading
        import time

        def hold(size: int) -> None:
            kept = bytearray(size)
            for place in range(0, size, 4096):
                kept[place] = 1
            while True:
                time.sleep(1)

        for _ in range(6):
            if os.fork() == 0:
                threading.Thread(target=hold, args=(100 << 20,)).start()
                ctypes.CDLL(None).pthread_exit(None)
        while True:
            time.sleep(1)


def going_headless(model: Any, **where: Any) -> None:
    """A process whose first thread is over, of which less is to be seen."""
    with model.session(**where):
        import ctypes
        import mmap
        import threading
        import time

        def hold() -> None:
            kept = [mmap.mmap(-1, 64 << 20) for _ in range(16)]
            for one in kept:
                one.write(b"x" * (64 << 20))
            while True:
                time.sleep(1)

        threading.Thread(target=hold).start()
        ctypes.CDLL(None).pthread_exit(None)


def mapping_pages(model: Any, **where: Any) -> None:
    """A large mapping with nothing in it but the tables that say so."""
    with model.session(**where):
        import ctypes
        import mmap
        import time

        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        size = 1 << 40
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
        start = libc.mmap(None, size, mmap.PROT_READ, flags, -1, 0)
        for place in range(start, start + size, 1 << 21):
            ctypes.string_at(place, 1)
        while True:
            time.sleep(1)


@pytest.mark.parametrize(
    "block", [mapping, unmapping, going_headless, mapping_pages, bearing], ids=lambda b: b.__name__
)
async def test_memory_that_no_limit_counts(walled: Service, block: Callable[..., None]) -> None:
    if block is bearing and walled.info.isolation.level is not Level.FULL:
        return
    failed = (await walled.send(block, limits=MEMORY)).failed
    assert failed.kind is FailureKind.OOM, failed.message
    assert "256 MiB" in failed.message
    error = failed.meta["error"]
    assert isinstance(error, dict)
    assert error["limit"] == "memory_bytes"
    assert error["peak_bytes"] > MEMORY.memory_bytes
    assert (await walled.send(trace)).saved


async def test_children_that_share_what_they_have_are_counted_once(walled: Service) -> None:
    if walled.info.isolation.level is not Level.FULL:
        return

    def sharing(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            import time

            import torch

            kept = torch.ones(40 << 20)  # 160 MiB
            children = []
            for _ in range(6):
                pid = os.fork()
                if pid == 0:
                    time.sleep(1.5)
                    os._exit(int(kept[0].item()))
                children.append(pid)
            ends = nnsight.save([os.waitpid(each, 0)[1] for each in children])

    limits = Limits(wall_s=120, memory_bytes=512 * MIB)
    assert (await walled.send(sharing, limits=limits)).values["ends"] == [256] * 6


def writing(model: Any, **where: Any) -> None:
    with model.session(**where):
        import time
        from pathlib import Path

        for number in range(64):
            Path(f"part-{number}").write_bytes(b"x" * (4 << 20))
        while True:
            time.sleep(1)


def deleting(model: Any, **where: Any) -> None:
    """Files that are in no folder any more."""
    with model.session(**where):
        import tempfile
        import time

        kept = []
        for _ in range(64):
            one = tempfile.TemporaryFile()  # noqa: SIM115 - it stays open
            one.write(b"x" * (4 << 20))
            one.flush()
            kept.append(one)
        while True:
            time.sleep(1)


def hiding(model: Any, **where: Any) -> None:
    """A folder that even its owner cannot look into."""
    with model.session(**where):
        import time
        from pathlib import Path

        Path("closed").mkdir()
        Path("closed/left").write_bytes(b"x" * (64 << 20))
        Path("closed").chmod(0)
        while True:
            time.sleep(1)


def digging(model: Any, **where: Any) -> None:
    """A tree deeper than anybody's stack."""
    with model.session(**where):
        import os
        import time
        from pathlib import Path

        for _ in range(1000):
            Path("in").mkdir()
            os.chdir("in")
        Path("left").write_bytes(b"x" * (64 << 20))
        while True:
            time.sleep(1)


@pytest.mark.parametrize("block", [writing, deleting, hiding, digging], ids=lambda b: b.__name__)
async def test_files_beyond_the_limit(walled: Service, block: Callable[..., None]) -> None:
    failed = (await walled.send(block, limits=SCRATCH)).failed
    assert failed.kind is FailureKind.LIMIT, failed.message
    assert (await walled.send(trace)).saved


async def test_a_full_folder_is_a_limit(gpt2: Any, tiny_gpt2: Path, tmp_path: Path) -> None:
    """At the full level it is a file system of its own, and is full at once, not when somebody looks."""

    def filling(model: Any, **where: Any) -> None:
        with model.session(**where):
            from pathlib import Path

            Path("all").write_bytes(b"x" * (64 << 20))

    async with serving(gpt2, tiny_gpt2, tmp_path / "engine", scratch_bytes=32 * MIB) as one:
        if one.info.isolation.level is not Level.FULL:
            absent(f"not to be had here: {one.info.isolation.missing}")
        failed = (await one.send(filling)).failed
        assert failed.kind is FailureKind.LIMIT, failed.message
        assert "No space left" in failed.message
        assert "limit of temporary files" in failed.message


async def test_more_threads_than_anybody_needs(walled: Service) -> None:
    def threading_on(model: Any, **where: Any) -> None:
        with model.session(**where):
            import threading
            import time

            threading.stack_size(64 << 10)
            refused = nnsight.save(False)
            for _ in range(1500):
                try:
                    threading.Thread(target=time.sleep, args=(600,)).start()
                except RuntimeError:
                    refused = nnsight.save(True)
                    break
            while not refused:
                time.sleep(1)

    reply = await walled.send(threading_on)
    if isinstance(reply.outcome, Failed):  # nobody counts the processes of root
        assert reply.failed.kind is FailureKind.LIMIT
        assert "the limit is 1,024" in reply.failed.message
    assert (await walled.send(trace)).saved


#: What is left out, and what then happens to a request that takes more of something than it may.
LEAKS = {
    "watch": (mapping, Limits(wall_s=2, memory_bytes=64 * MIB), FailureKind.TIMEOUT),
    "scratch": (writing, SCRATCH, FailureKind.LIMIT),
}


@pytest.mark.parametrize("wall", LEAKS)
async def test_what_is_left_out_is_missed(
    gpt2: Any, tiny_gpt2: Path, tmp_path: Path, wall: str
) -> None:
    """Without the watch nothing ends who shares memory; without a file system of its own, the watch ends who writes too much."""
    block, limits, kind = LEAKS[wall]
    engine = Engine(spec(tiny_gpt2, tmp_path / "engine"), launching(frozenset({wall})))
    info = await engine.start()
    try:
        service = Service(engine=engine, info=info, model=gpt2)
        assert wall not in info.isolation.steps
        assert (await service.send(block, limits=limits)).failed.kind is kind
    finally:
        await engine.stop()
