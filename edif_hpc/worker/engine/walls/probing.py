"""Finding out how strong walls are here, by trying to get out.

That a kernel takes a rule says little: it may grant a namespace and refuse every mount in it (Ubuntu's AppArmor does), know
Landlock and have it switched off, or be a sandbox that imitates the calls. So a throw-away process goes the whole way of an executor and
then attempts what a hostile request would: one escape for each thing that a level promises. The level is the strongest one
from which none succeeded; what stronger ones failed on is kept, in words, for `ps` and for who wants to raise it.

An attempt counts as denied if the kernel says so. Any other answer is a way out, also one that this module did not think of.
All of it takes a few milliseconds beyond the forks.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from edif_hpc.errors import EngineError, IsolationTooWeak
from edif_hpc.worker.engine.values import Level
from edif_hpc.worker.engine.walls import denied, syscalls
from edif_hpc.worker.engine.walls.jail import (
    CHOICES,
    OPEN_FILES,
    SCRATCH_BYTES,
    Jail,
    Layers,
    in_child,
)

#: A call that the kernel lacks is as good as denied; so is a process that cannot be seen.
_DENIED = frozenset({errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.ESRCH})
_CAP_SYS_ADMIN = 1 << 21
_PTRACE_SEIZE = 0x4206

#: What is attempted, and how. It is denied if it raises one of `_DENIED`.
Escapes = Iterator[tuple[str, Callable[[], object]]]


def probe(
    scratch: Path, *, ceiling: Level, floor: Level, make_jail: Callable[[Layers], Jail] = Jail
) -> tuple[Layers, tuple[str, ...]]:
    """Find the strongest walls that hold here, by trying, and at most `ceiling`.

    Returns them, and what stronger ones failed on.

    Raises:
        IsolationTooWeak: what works is below `floor`.
    """
    missing: list[str] = []
    for layers in CHOICES:
        if not ceiling.reaches(layers.level):
            continue
        refusal = _try(layers, scratch, make_jail)
        if refusal is None:
            break
        missing.append(f"{layers.level}: {refusal}")
    else:
        raise EngineError(f"no executor can be started at all: {'; '.join(missing)}")
    if not layers.level.reaches(floor):
        raise IsolationTooWeak(
            f"executors can be confined at level {layers.level!s} here, below the floor "
            f"{floor!s} ({'; '.join(missing) or f'the ceiling is {ceiling!s}'}); lower the floor only "
            "for people who may read each other's work (edif-hpc deployment add … --isolation-floor)"
        )
    return layers, tuple(missing)


def _try(layers: Layers, scratch: Path, make_jail: Callable[[Layers], Jail]) -> str | None:
    """Go the whole way to a confined child in a throw-away process, and try to escape; return what went wrong."""
    place = Path(tempfile.mkdtemp(prefix="probe-", dir=scratch))
    own, other = place / "own", place / "other"
    for folder in (own, other):
        folder.mkdir(mode=0o700)

    def zygote() -> None:
        jail = make_jail(layers)
        jail.shut(scratch)
        with in_child(jail.fork) as complaint:
            if complaint is None:
                jail.enter(own)
                _must_hold(escapes(layers, own=own, other=other))
        if complaint:
            raise EngineError(complaint)

    try:
        with in_child(os.fork) as complaint:
            if complaint is None:
                zygote()
    finally:
        shutil.rmtree(place)
    return complaint or None


def _must_hold(attempts: Escapes) -> None:
    open_ones = [name for name, act in attempts if not _is_denied(act)]
    if open_ones:
        raise EngineError(f"not denied although the kernel took the rules: {', '.join(open_ones)}")


def _is_denied(act: Callable[[], object]) -> bool:
    try:
        act()
    except OSError as error:
        return error.errno in _DENIED
    except ValueError:  # what Python makes of an EPERM of setrlimit
        return True
    return False


def escapes(layers: Layers, *, own: Path, other: Path) -> Escapes:
    """Yield what must be denied behind these walls to a process that may write in `own`, beside which `other` lies."""
    yield "gaining a capability", lambda: syscalls.set_capabilities(_CAP_SYS_ADMIN)
    yield "opening more files", lambda: _open_as(OPEN_FILES)
    yield "raising a limit", _raise_limit
    if layers.landlock:
        yield "listing another folder", partial(os.listdir, other)
        yield "writing elsewhere", (other / "left").touch
    if layers.seccomp:
        yield from _calls()
        yield "signalling other processes", lambda: os.kill(-1, 0)
    if layers.seccomp and not layers.namespaces:
        yield "starting a process", lambda: os.fork() or os._exit(0)
    if layers.landlock and not layers.namespaces:
        yield "a process's environment", Path(f"/proc/{os.getppid()}/environ").read_bytes
    if layers.namespaces:
        yield "seeing other processes", _see_others
        yield "files beyond the scratch", lambda: _reserve(own / "large", SCRATCH_BYTES + 1)


def _calls() -> Escapes:
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK):
        yield f"a socket of {family.name}", partial(_open_socket, family)
    numbers = {name: nr for group in denied.ALWAYS.values() for name, nr in group.items()}
    for name in (
        "mount",
        "unshare",
        "keyctl",
        "bpf",
        "perf_event_open",
        "io_uring_setup",
    ):
        yield name, partial(syscalls.call, numbers[name])
    # One that fails by its arguments: who is traced stops at the next signal, and nobody would wake this process.
    yield "ptrace", partial(syscalls.call, numbers["ptrace"], _PTRACE_SEIZE, os.getpid(), 1)
    yield "process_vm_readv", partial(syscalls.call, numbers["process_vm_readv"], os.getpid())


def _open_socket(family: socket.AddressFamily) -> None:
    socket.socket(family).close()


def _open_as(number: int) -> None:
    """Have a file open by a number; that there is none so high is a denial, too."""
    file = os.open(os.devnull, os.O_RDONLY)
    try:
        os.dup2(file, number)
    except OSError as error:
        raise PermissionError(errno.EPERM, str(error)) from error


def _raise_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard + 1, hard + 1))


def _see_others() -> None:
    seen = [each for each in os.listdir("/proc") if each.isdigit()]  # noqa: PTH208 - see above
    if seen == [str(os.getpid())]:
        raise ProcessLookupError(errno.ESRCH, "there are none")


def _reserve(file: Path, size: int) -> None:
    """Have a file of that size, at once; that there is no room is a denial, too."""
    with file.open("wb") as opened:
        try:
            os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            raise PermissionError(errno.EPERM, str(error)) from error
