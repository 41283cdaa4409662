"""What an executor cannot do, level by level, tried by a request as a researcher would send it."""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

import asyncio
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import msgpack
import nnsight
import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.worker.engine.environment import OFFLINE, home, places
from edif_hpc.worker.engine.values import FailureKind, Level, Limits
from edif_hpc.worker.engine.walls import landlock
from tests.integration.worker.conftest import KEY, Service, serving
from tests.integration.worker.test_fidelity import trace


def trying(secret: str, zygote: int) -> Any:  # noqa: C901 - a block is one piece
    """A block that tries things and returns the name of each one's error, or 'done'."""

    def block(model: Any, **where: Any) -> None:  # noqa: C901
        with model.session(**where):
            import ctypes
            import errno
            import os
            import socket
            import subprocess
            import threading
            from pathlib import Path

            def processes() -> None:
                if [one.name for one in Path("/proc").iterdir() if one.name.isdigit()] != ["1"]:
                    raise RuntimeError("others can be seen")

            libc = ctypes.CDLL(None, use_errno=True)

            def call(number: int, *arguments: Any) -> None:
                if libc.syscall(number, *arguments) < 0:
                    code = ctypes.get_errno()
                    raise OSError(code, os.strerror(code))

            def thread() -> None:
                one = threading.Thread(target=lambda: None)
                one.start()
                one.join()

            attempts = {
                "processes": processes,
                "socket": lambda: socket.socket().close(),
                "unix socket": lambda: socket.socket(socket.AF_UNIX).close(),
                "socketpair": lambda: [s.close() for s in socket.socketpair()],
                "read a secret": lambda: Path(secret).read_text(),
                "list a folder": lambda: list(Path(secret).parent.iterdir()),
                "siblings": lambda: list(Path("..").iterdir()),
                "write elsewhere": lambda: Path(f"{secret}-left").write_text("x"),
                "own folder": lambda: Path("mine").write_text("x"),
                "signal the zygote": lambda: os.kill(zygote, 0),
                "fork": lambda: os.fork() or os._exit(0),
                "program": lambda: subprocess.run(["/bin/true"], check=True),
                "thread": thread,
                "mount": lambda: call(165, b"none", b"/", None, 0, None),
                "namespace": lambda: call(272, 0x10000000),
                "ptrace": lambda: call(101, 0, 0, 0, 0),
                "bpf": lambda: call(321, 0, None, 0),
                "io_uring": lambda: call(425, 1, None),
                "keyctl": lambda: call(250, 0, 0, 0, 0, 0),
                "perf": lambda: call(298, None, 0, -1, -1, 0),
                "outlive": lambda: call(157, 1, 0, 0, 0, 0),
            }
            told = nnsight.save({})
            for name, attempt in attempts.items():
                try:
                    attempt()
                    told[name] = "done"
                except RuntimeError as error:
                    told[name] = str(error)
                except OSError as error:
                    denied = error.errno in {errno.EPERM, errno.EACCES, errno.EROFS}
                    told[name] = "denied" if denied else type(error).__name__
            status = nnsight.save(Path("/proc/self/status").read_text())

    return block


ALWAYS_DENIED = (
    "socket", "unix socket", "mount", "namespace", "ptrace", "bpf", "io_uring", "keyctl", "perf",
    "outlive",
)  # fmt: skip
FILES = ("read a secret", "list a folder", "siblings", "write elsewhere")
EXPECTED: dict[Level, dict[str, str]] = {
    Level.FULL: dict.fromkeys([*ALWAYS_DENIED, *FILES], "denied")
    | {"signal the zygote": "ProcessLookupError"}
    | dict.fromkeys(["fork", "program", "processes"], "done"),
    Level.NO_NAMESPACES: dict.fromkeys(
        [*ALWAYS_DENIED, *FILES, "signal the zygote", "fork", "program", "processes"], "denied"
    ),
    Level.PROCESS: dict.fromkeys([*ALWAYS_DENIED, "fork", "signal the zygote"], "denied"),
}


async def test_what_is_denied(walled: Service, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of another")
    values = (await walled.send(trying(str(secret), walled.engine._zygote.process.pid))).values
    told = values["told"]
    expected = EXPECTED[walled.info.isolation.level]
    assert {name: told[name] for name in expected} == expected
    assert (told["own folder"], told["thread"], told["socketpair"]) == ("done",) * 3
    status = dict(line.split(":\t", 1) for line in values["status"].splitlines() if ":\t" in line)
    assert status["NoNewPrivs"] == "1"
    assert {int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")} == {0}


async def test_what_the_kernel_offers_is_used(service: Service) -> None:
    if landlock.abi() == 0:
        absent("this kernel has no Landlock")
    assert service.info.isolation.level is not Level.PROCESS, service.info.isolation.missing


async def test_the_steps_come_in_order_and_before_ready(walled: Service) -> None:
    steps = walled.info.isolation.steps
    full = (
        "mounts",
        "scratch",
        "shm",
        "proc",
        "user",
        "session",
        "privileges",
        "limits",
        "parent",
        "landlock",
        "seccomp",
    )
    left_out = {
        Level.FULL: set(),
        Level.NO_NAMESPACES: {"mounts", "scratch", "shm", "proc", "user"},
        Level.PROCESS: {"mounts", "scratch", "shm", "proc", "user", "landlock"},
    }[walled.info.isolation.level]
    assert steps == tuple(step for step in full if step not in left_out)


def reaching(pids: list[int], paths: list[str]) -> Any:  # noqa: C901 - a block is one piece
    """A block that tries to get at processes and files, and returns what was said each time."""

    def block(model: Any, **where: Any) -> None:  # noqa: C901
        with model.session(**where):
            import ctypes
            import errno
            import fcntl
            import os
            import resource
            from pathlib import Path

            libc = ctypes.CDLL(None, use_errno=True)

            def call(*arguments: int) -> None:
                if libc.syscall(*map(ctypes.c_long, arguments)) < 0:
                    raise OSError(ctypes.get_errno(), "refused")

            def lend(pid: int) -> None:
                """Have the signals of one's own file sent to another."""
                end = os.pipe()[0]
                fcntl.fcntl(end, fcntl.F_SETOWN, pid)
                fcntl.fcntl(end, fcntl.F_SETSIG, 9)

            def notice(path: str) -> None:
                queue = libc.inotify_init1(0)
                if queue < 0 or libc.inotify_add_watch(queue, os.fsencode(path), 0x100) < 0:
                    raise OSError(ctypes.get_errno(), "refused")

            def read(path: str) -> None:
                os.close(os.open(path, os.O_RDONLY))

            ways = {
                "kill": lambda pid: os.kill(pid, 0),
                "signals of files": lend,
                "processors": lambda pid: os.sched_setaffinity(pid, {0}),
                "priority": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 5),
                "limits": lambda pid: resource.prlimit(pid, resource.RLIMIT_CORE),
                "ptrace": lambda pid: call(101, 16, pid, 0, 0),
                "process_vm_readv": lambda pid: call(310, pid, 0, 0, 0, 0, 0),
                "pidfd": lambda pid: call(438, os.pidfd_open(pid), 0, 0),
            }
            ways |= {
                name: lambda pid, name=name: read(f"/proc/{pid}/{name}")
                for name in ("environ", "mem", "maps", "cmdline", "fd", "root", "status")
            }
            attempts = [(f"{name} {pid}", way, pid) for name, way in ways.items() for pid in pids]
            attempts += [(f"read {path}", read, path) for path in paths]
            attempts += [(f"write {p}", lambda q: Path(q).write_bytes(b"x"), p) for p in paths]
            attempts += [(f"own {p}", lambda q: os.chown(q, 0, os.getgid()), p) for p in paths]
            attempts += [(f"mark {p}", lambda q: os.setxattr(q, "user.x", b""), p) for p in paths]
            attempts += [(f"notice {p}", notice, p) for p in paths]
            told = nnsight.save({})
            for name, way, what in attempts:
                try:
                    way(what)
                    told[name] = "done"
                except OSError as error:
                    told[name] = errno.errorcode[error.errno or 0]

    return block


def waiting(model: Any, **where: Any) -> None:
    with model.session(**where):
        import time

        print("it runs")  # noqa: T201 - so that the test knows
        while True:
            time.sleep(1)


async def test_of_others_of_the_same_user_nothing_is_to_be_had(
    walled: Service, tmp_path: Path
) -> None:
    """The worker, the zygote and the executors of others run as the same user, and so do their files."""
    if walled.info.isolation.level is Level.PROCESS:
        return  # there the account is the wall
    key = tmp_path / "worker.key"
    key.write_text("secret")
    engine = walled.engine
    blob = engine.spec.scratch / "blob"
    blob.write_text("of another")
    said: list[str] = []
    anothers = asyncio.create_task(engine.run(walled.job(waiting), said.append))
    try:
        await wait_until_async(
            lambda: len(engine._line._given) == len(said) == 1, 60.0, "only another's request runs"
        )
        (seat,) = engine._line._given
        await wait_until_async(lambda: seat.pid is not None, 60.0, "its number is known")
        pids = [os.getpid(), engine._zygote.process.pid, seat.pid]
        paths = [str(each) for each in (key, blob.parent, blob, seat.result, seat.folder)]
        told = (await walled.send(reaching(pids, paths))).values["told"]
    finally:
        anothers.cancel()
        await asyncio.gather(anothers, return_exceptions=True)
        blob.unlink()
    refusals = {"EPERM", "EACCES", "ESRCH", "ENOENT", "EROFS", "EISDIR"}
    assert {name: said for name, said in told.items() if said not in refusals} == {}
    assert len(told) == 15 * len(pids) + 5 * len(paths)


async def test_modes_and_times_of_others_files_stay_as_they_are(
    walled: Service, tmp_path: Path
) -> None:
    """Landlock knows nothing of them: a mount that is read-only keeps them, or a call that only says that it was made."""
    if walled.info.isolation.level is Level.PROCESS:
        return
    key = tmp_path / "worker.key"
    key.touch(mode=0o600)
    before = key.stat()
    path = str(key)

    def opening_up(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            from contextlib import suppress
            from pathlib import Path

            for name in (path, os.environ["PYTHONPATH"] + "/edif_hpc/__init__.py"):
                with suppress(OSError):
                    Path(name).chmod(0o777)
                with suppress(OSError):
                    os.utime(name, (0, 0))
                with suppress(OSError):
                    opened = os.open(name, os.O_RDONLY)
                    os.fchmod(opened, 0o777)
            Path("mine").write_text("x")
            Path("mine").chmod(0o600)
            mine = nnsight.save(Path("mine").read_text())

    assert (await walled.send(opening_up)).values["mine"] == "x"
    after = key.stat()
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)


async def test_a_session_of_its_own_and_the_first_to_go(walled: Service) -> None:
    def looking(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            import resource
            from pathlib import Path

            session = nnsight.save(os.getsid(0) == os.getpid())
            score = nnsight.save(Path("/proc/self/oom_score_adj").read_text())
            kinds = ("CORE", "MSGQUEUE", "NICE", "RTPRIO", "NOFILE", "SIGPENDING")
            limits = nnsight.save(
                {each: resource.getrlimit(getattr(resource, f"RLIMIT_{each}")) for each in kinds}
            )

    values = (await walled.send(looking)).values
    assert values["session"]
    assert values["score"].strip() == "1000"
    assert {name: hard for name, (_, hard) in values["limits"].items()} == {
        "CORE": 1, "MSGQUEUE": 0, "NICE": 0, "RTPRIO": 0, "NOFILE": 1024, "SIGPENDING": 1024,
    }  # fmt: skip
    assert all(soft == hard for soft, hard in values["limits"].values())


async def test_an_executor_has_no_descriptor_but_its_own(walled: Service) -> None:
    def counting(model: Any, **where: Any) -> None:
        with model.session(**where):
            import fcntl

            def is_open(fd: int) -> bool:
                try:
                    fcntl.fcntl(fd, fcntl.F_GETFD)
                except OSError:
                    return False
                return True

            open_ones = nnsight.save([fd for fd in range(512) if is_open(fd)])

    assert (await walled.send(counting)).values["open_ones"] == [0, 1, 2, 3, 4]


async def test_nothing_of_the_workers_environment_is_inherited(service: Service) -> None:
    def looking(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os

            names = nnsight.save(sorted(os.environ))

    names = set((await service.send(looking)).values["names"])
    assert names <= {
        "PATH", "LANG", "HOME", "TMPDIR", "PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONDONTWRITEBYTECODE",
        "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM",
        "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_OFFLINE", "LC_CTYPE", "KMP_INIT_AT_FORK",
        "KMP_DUPLICATE_LIB_OK", "PYTORCH_NVML_BASED_CUDA_CHECK", "CUDA_VISIBLE_DEVICES",
            *places(Path()), *OFFLINE,
    }  # fmt: skip


async def test_no_executor_finds_what_another_has_cached(walled: Service) -> None:
    """Neither where libraries look for what they compiled before, nor where the zygote keeps its own."""
    names = tuple(places(Path()))

    def leaving(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            from pathlib import Path

            for name in names:
                folder = Path(os.environ[name])
                folder.mkdir(exist_ok=True)
                (folder / "kernel.so").write_text("poison")
            written = nnsight.save({name: os.environ[name] for name in names})

    def looking(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            from pathlib import Path

            import torch._inductor.runtime.cache_dir_utils as inductor

            home = nnsight.save(str(Path.home()))
            cache = nnsight.save(inductor.cache_dir())
            found = nnsight.save([n for n in names if Path(os.environ[n], "kernel.so").exists()])

    written = (await walled.send(leaving)).values["written"]
    values = (await walled.send(looking)).values
    assert values["found"] == []
    assert values["home"] != written["HOME"]
    assert values["cache"] == values["home"] + "/.inductor"
    zygotes = home(walled.engine.spec.scratch)
    assert not [*zygotes.rglob("kernel.so")]


async def test_the_zygotes_home_is_read_and_not_written(walled: Service) -> None:
    """Code of a model that came with its checkpoint lies there, and a block may want to read it."""
    folder = home(walled.engine.spec.scratch)
    (folder / "module.py").write_text("x = 1")
    place = str(folder)

    def using(model: Any, **where: Any) -> None:
        with model.session(**where):
            from pathlib import Path

            read = nnsight.save(Path(place, "module.py").read_text())
            refused = nnsight.save("no")
            try:
                Path(place, "module.py").write_text("x = 2")
            except OSError:
                refused = nnsight.save("yes")

    values = (await walled.send(using)).values
    assert values["read"] == "x = 1"
    walls = walled.info.isolation.level is not Level.PROCESS
    assert values["refused"] == ("yes" if walls else "no")


def frame(value: Any) -> bytes:
    payload = msgpack.packb(value)
    return struct.pack(">I", len(payload)) + payload


HOSTILE = {
    "garbage": b"\xc1" * 64,
    "four gigabytes": b"\xff\xff\xff\xff",
    "no msgpack": struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
    "no message": frame({"a": 1}),
    "unknown message": frame(["Load", {}]),
    "a message of the zygote": frame(["Forked", {"executor": 1, "pid": 1}]),
    "missing field": frame(["Done", {"inline": b"", "size": 0}]),
    "extra field": frame(["Log", {"text": "a", "more": 1}]),
    "wrong type": frame(["Done", {"inline": "text", "size": 1, "meta": {}}]),
    "a size that is a truth": frame(["Written", {"size": True}]),
    "negative": frame(["Written", {"size": -1}]),
    "deep": frame(["Done", {"inline": b"", "size": 0, "meta": {"a": [[[[[[1]]]]]]}}]),
    "very deep": struct.pack(">I", 100_000) + b"\x91" * 100_000,
    "much meta": frame(["Done", {"inline": b"", "size": 0, "meta": {"a": "x" * 300_000}}]),
    "many words": frame(
        [
            "Broken",
            {"kind": "user", "message": "x" * 300_000, "lacked_gradients": False, "meta": {}},
        ]
    ),
    "bytes in meta": frame(["Done", {"inline": b"", "size": 0, "meta": {"a": b"x"}}]),
    "size that is not so": frame(["Done", {"inline": b"abc", "size": 4, "meta": {}}]),
    "a file that is not so": frame(["Done", {"inline": None, "size": 4, "meta": {}}]),
    "a kind of ours": frame(
        ["Broken", {"kind": "engine", "message": "", "lacked_gradients": False, "meta": {}}]
    ),
    "ready again": frame(["Ready", {"steps": []}]),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_frames_end_their_executor_only(service: Service, name: str) -> None:
    content = HOSTILE[name]

    def lying(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os
            import time

            left = content
            while left:
                left = left[os.write(3, left) :]
            while True:
                time.sleep(1)

    failed = (await service.send(lying, limits=Limits(wall_s=60, log_lines=100))).failed
    assert failed.kind is FailureKind.CRASH
    assert "protocol" in failed.message
    assert (await service.send(trace)).saved


async def test_the_hubs_token_reaches_no_executor(
    gpt2: Any, tiny_gpt2: Path, tmp_path: Path
) -> None:
    """Neither its environment nor any of its memory holds it."""
    halves = ("hf_secret", "token_of_the_lab")

    def searching(model: Any, **where: Any) -> None:
        with model.session(**where):
            import re
            from pathlib import Path

            # Written so that looking for it does not put it into memory.
            token = re.compile(
                halves[0].encode() + b"[" + halves[1][:1].encode() + b"]" + halves[1][1:].encode()
            )
            found = nnsight.save([])
            with Path("/proc/self/mem").open("rb", buffering=0) as memory:
                for line in Path("/proc/self/maps").read_text().splitlines():
                    span, mode, _, _, inode = line.split()[:5]
                    start, end = (int(part, 16) for part in span.split("-"))
                    if mode.startswith("rw") and inode == "0" and "[v" not in line:
                        memory.seek(start)
                        found += [m.start() for m in token.finditer(memory.read(end - start))]
            environment = nnsight.save(Path("/proc/self/environ").read_bytes())

    async with serving(gpt2, tiny_gpt2, tmp_path / "engine", hub_token="".join(halves)) as service:
        values = (await service.send(searching)).values
        assert b"hf_secret" not in values["environment"]
        assert values["found"] == []


def readable_copy(source: str, target: str) -> str:
    """Copy a file so that others may read it: weights are written for their owner alone."""
    shutil.copyfile(source, target)
    Path(target).chmod(0o644)
    return target


async def test_an_ordinary_user_is_walled_in_and_watched_too(
    ordinary_user: list[str], tiny_gpt2: Path, tmp_path: Path
) -> None:
    """What the worker may look at is for the kernel to say, and it lets root look at anything."""
    script = """
import asyncio, sys, tempfile
from pathlib import Path
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.walls.memory import living
from edif_hpc.worker.engine.values import EngineSpec, Level, Limits
from edif_hpc.worker.engine.walls.watch import seen

async def main(key, source):
    with tempfile.TemporaryDirectory() as scratch:
        spec = EngineSpec(model_key=key, source=source, scratch=Path(scratch), floor=Level.PROCESS, ready=1)
        engine = Engine(spec)
        print((await engine.start()).isolation.level)
        while not engine._line.ready:  # the one that ran the self-test is on its way out
            await asyncio.sleep(0.01)
        seat = engine._line.ready[0]
        sight = seen(seat, living(Path(f"/proc/{seat.pid}")), Limits(memory_bytes=0))
        print(sight.threads > 0)
        await engine.stop()

asyncio.run(main(*sys.argv[1:]))
"""
    with tempfile.TemporaryDirectory() as public:
        os.chmod(public, 0o755)  # noqa: PTH101
        model = shutil.copytree(tiny_gpt2, Path(public) / "model", copy_function=readable_copy)
        ended = subprocess.run(  # noqa: ASYNC221
            [*ordinary_user, sys.executable, "-c", script, KEY, str(model)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[3],
            check=False,
            timeout=120,
        )
    level, watched = ended.stdout.split() or ("", "")
    assert level in {Level.FULL, Level.NO_NAMESPACES}, ended.stderr
    assert watched == "True"
