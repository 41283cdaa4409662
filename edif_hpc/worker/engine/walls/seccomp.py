"""seccomp: which system calls a process may make, as a small program that the kernel runs on each.

What is denied is what a researcher's code has no use for and an attacker does: sockets, other processes' memory, mounts and
namespaces, keys, BPF, io_uring, performance counters, System V IPC, the clock and the kernel itself; `denied` has the table. A
denied call fails with EPERM, so libraries see an ordinary error. Of some calls it depends on an argument:

* `clone3` hides its flags behind a pointer that a filter cannot read. It fails with ENOSYS, and the C library falls back to
  `clone`. So do calls that are newer than the table.
* `socketpair` makes only local streams, and `sendto` takes no address: a pair of datagrams could otherwise be spoken from to any
  socket of this machine whose name can be seen, such as that of its log.
* `prctl` must not make a process unreadable to who watches it, nor let it outlive its zygote.

Without a PID namespace nothing would end the children of a killed executor, so there `threads_only` denies new processes (a
child that called `setsid` would outlive it), and whatever reaches a process of the same user by its number: signals, also those
that a file sends to its owner, priorities, processors. There, too, nothing else keeps it from what Landlock does not rule over: the
modes, times and owners of files that are its user's.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable, Iterator

from edif_hpc.worker.engine.walls import denied, syscalls

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2

# Classic BPF: load a word of seccomp_data, jumps, and, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16
_ALLOW, _KILL = 0x7FFF0000, 0x80000000

_CLONE_FILES, _CLONE_THREAD = 0x00000400, 0x00010000
_CLOSE_RANGE_UNSHARE = 2
_CLONE_NAMESPACES = 0x7E020000
_AF_UNIX, _SOCK_STREAM, _SOCK_SEQPACKET = 1, 1, 5
_SOCK_FLAGS = 0o2004000  # CLOEXEC, NONBLOCK: no part of the type
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_MM, _PR_SCHED_CORE = 1, 4, 35, 62
_PR_SET_PTRACER = 0x59616D61
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
#: Who leases a file (F_SETLEASE, F_SETDELEG) lets the next to open it wait for up to 45 s: the worker, when it reads a result.
_FCNTLS = (1024, 1040)
#: To whom a file's signals go, which may be any signal (F_SETOWN, F_SETSIG, F_SETOWN_EX).
_FCNTLS_BESIDE_OTHERS = (8, 10, 15)
#: The same (FIOSETOWN, SIOCSPGRP), and attributes of files (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR, FS_IOC_ENABLE_VERITY).
_IOCTLS_BESIDE_OTHERS = (0x8901, 0x8902, 0x40086602, 0x401C5820, 0x40806685)

_NR_IOCTL, _NR_SENDTO, _NR_SOCKETPAIR, _NR_CLONE, _NR_KILL, _NR_FCNTL = 16, 44, 53, 56, 62, 72
_NR_PRCTL, _NR_SCHED_SETAFFINITY, _NR_TGKILL, _NR_PRLIMIT64, _NR_CLONE3 = 157, 203, 234, 302, 435
_NR_CLOSE_RANGE = 436


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _fail(number: int) -> bytes:
    return _op(_RETURN, 0x00050000 | number)


def _argument(index: int, *, high: bool = False) -> bytes:
    """Load the lower half of an argument: all that the kernel looks at, unless it is a pointer."""
    return _op(_LOAD, _ARGS_OFFSET + 8 * index + 4 * high)


def _when(nr: int, body: list[bytes]) -> list[bytes]:
    """For the call `nr`, run `body`, which must return."""
    return [_op(_EQUAL, nr, 0, len(body)), *body]


def _only_if(index: int, values: Iterable[int], *, ignoring: int = 0) -> list[bytes]:
    """Fail unless the argument, without the bits to ignore, is one of `values`."""
    tests = [op for v in values for op in (_op(_EQUAL, v, 0, 1), _op(_RETURN, _ALLOW))]
    return [_argument(index), _op(_AND, 0xFFFFFFFF ^ ignoring), *tests, _fail(errno.EPERM)]


def _unless(index: int, values: Iterable[int]) -> list[bytes]:
    """Fail if the argument is one of `values`, else allow."""
    tests = [op for v in values for op in (_op(_EQUAL, v, 0, 1), _fail(errno.EPERM))]
    return [_argument(index), *tests, _op(_RETURN, _ALLOW)]


def _only_null(index: int) -> list[bytes]:
    """Fail unless the argument is no pointer."""
    halves = [_argument(index), _op(_EQUAL, 0, 0, 2), _argument(index, high=True)]
    return [*halves, _op(_EQUAL, 0, 1, 0), _fail(errno.EPERM), _op(_RETURN, _ALLOW)]


def _unless_now() -> list[bytes]:
    """Say that it was done, unless the time is to be that of now: `Path.touch` takes that for a file that is there."""
    low, high = _argument(2), _argument(2, high=True)
    return [low, _op(_EQUAL, 0, 0, 3), high, _op(_EQUAL, 0, 0, 1), _fail(errno.EPERM), _fail(0)]


def program(*, threads_only: bool, device: bool, pid: int) -> bytes:
    """Return the filter for the process `pid`; with `device` it may do what drivers of GPUs need."""
    prctls = [_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_MM, _PR_SCHED_CORE, _PR_SET_PTRACER]
    ioctls = [_TIOCSTI, _TIOCLINUX] + (list(_IOCTLS_BESIDE_OTHERS) if threads_only else [])
    fcntls = [*_FCNTLS, *(_FCNTLS_BESIDE_OTHERS if threads_only else ())]
    ops = [
        _op(_LOAD, _ARCH_OFFSET),
        _op(_EQUAL, _ARCH_X86_64, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NR_OFFSET),
        _op(_AT_LEAST, _X32_BIT, 0, 1),
        _fail(errno.EPERM),
        _op(_AT_LEAST, denied.NEWEST + 1, 0, 1),
        _fail(errno.ENOSYS),
        *_when(_NR_CLONE3, [_fail(errno.ENOSYS)]),
        *_when(_NR_SENDTO, _only_null(4)),
        *_when(_NR_SOCKETPAIR, _local_streams()),
        *_when(_NR_PRCTL, _unless(0, prctls)),
        *_when(_NR_IOCTL, _unless(1, ioctls)),
        *_when(_NR_FCNTL, _unless(1, fcntls)),
        *_when(_NR_PRLIMIT64, _only_if(0, [0, pid])),
        *_when(_NR_CLONE, _clone(threads_only=threads_only)),
        *_when(_NR_CLOSE_RANGE, _unless(2, [_CLOSE_RANGE_UNSHARE, _CLOSE_RANGE_UNSHARE | 4])),
    ]
    if threads_only:
        ops += _when(_NR_KILL, _only_if(0, [pid])) + _when(_NR_TGKILL, _only_if(0, [pid]))
        ops += _when(_NR_SCHED_SETAFFINITY, _only_if(0, [0, pid]))
        for name, nr in denied.SILENT_BESIDE_OTHERS.items():
            ops += _when(nr, _unless_now() if name == "utimensat" else [_fail(0)])
    for nr in _denied(threads_only=threads_only, device=device):
        ops += _when(nr, [_fail(errno.EPERM)])
    return b"".join([*ops, _op(_RETURN, _ALLOW)])


def _denied(*, threads_only: bool, device: bool) -> Iterator[int]:
    for group in denied.ALWAYS.values():
        yield from group.values()
    if threads_only:
        yield from denied.BESIDE_OTHERS.values()
        yield from denied.OWNERS_BESIDE_OTHERS.values()
    if not device:
        yield from denied.WITHOUT_DEVICE.values()


def _clone(*, threads_only: bool) -> list[bytes]:
    threads = [_op(_ANY_BIT, _CLONE_THREAD, 1, 0), _fail(errno.EPERM)] if threads_only else []
    spaces = [_op(_ANY_BIT, _CLONE_NAMESPACES, 0, 1), _fail(errno.EPERM)]
    # A thread with descriptors of its own would have as many as a process, and nobody would see them.
    files = [
        _op(_ANY_BIT, _CLONE_THREAD, 0, 2),
        _op(_ANY_BIT, _CLONE_FILES, 1, 0),
        _fail(errno.EPERM),
    ]
    return [_argument(0), *spaces, *files, *threads, _op(_RETURN, _ALLOW)]


def _local_streams() -> list[bytes]:
    local = [_argument(0), _op(_EQUAL, _AF_UNIX, 1, 0), _fail(errno.EPERM)]
    return [*local, *_only_if(1, [_SOCK_STREAM, _SOCK_SEQPACKET], ignoring=_SOCK_FLAGS)]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def restrict(*, threads_only: bool, device: bool) -> None:
    """Install the filter, for this thread and all that it starts, for ever.

    Raises:
        OSError: the kernel refuses, or this is no x86_64.
    """
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    code = program(threads_only=threads_only, device=device, pid=os.getpid())
    prog = _Program(length=len(code) // 8, code=code)
    result = syscalls.libc().prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(prog), 0, 0
    )
    syscalls.check(result, "seccomp")
