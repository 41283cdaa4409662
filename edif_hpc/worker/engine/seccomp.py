"""seccomp: which system calls a process may make, as a small program that the kernel runs on each.

What is denied is what a researcher's code has no use for and an attacker does: sockets (the one that
the executor needs is open already; `socketpair` stays, asyncio wants it), other processes' memory,
mounts and namespaces, keys, BPF, io_uring, performance counters, System V IPC, the clock and the
kernel itself. A denied call fails with EPERM, so libraries see an ordinary error.

Without a PID namespace nothing would end the children of a killed executor, so there `threads_only`
denies new processes (a child that called `setsid` would outlive it), and signals to anybody else.
`clone3` hides its flags behind a pointer that a filter cannot read: it fails with ENOSYS, and the C
library falls back to `clone`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable

from edif_hpc.worker.engine import syscalls

_ARCH_X86_64 = 0xC000003E
_X32_BIT = 0x40000000
_PR_SET_SECCOMP = 22
_MODE_FILTER = 2

# Classic BPF: load a word of seccomp_data, jump, and, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16
_ALLOW, _KILL = 0x7FFF0000, 0x80000000

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020000
_PR_SET_PDEATHSIG = 1
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C

_NR_IOCTL, _NR_CLONE, _NR_FORK, _NR_VFORK, _NR_KILL = 16, 56, 57, 58, 62
_NR_PRCTL, _NR_TGKILL, _NR_PRLIMIT64, _NR_CLONE3 = 157, 234, 302, 435

#: x86_64 numbers, denied at every level.
_DENIED = {
    "sockets": (41, 42, 43, 49, 50, 288),
    "other processes": (101, 310, 311, 312, 438, 440),
    "mounts": (155, 161, 165, 166, 428, 429, 430, 431, 432, 433, 442, 467),
    "namespaces": (272, 308),
    "keys": (248, 249, 250),
    "kernel surface": (212, 298, 303, 304, 321, 323, 425, 426, 427, 447),
    "kernel": (103, 163, 167, 168, 169, 175, 176, 246, 313, 320),
    "machine": (153, 154, 159, 164, 170, 171, 172, 173, 179, 227, 300, 305, 443),
    "legacy": (134, 135, 139, 180),
    "memory of others": (256, 279),
    "System V IPC and message queues": (29, 30, 31, 64, 65, 66, 67, 68, 69, 70, 71, 220, 240, 241),
}
#: Also denied where executors share a PID namespace with others of the same user.
_DENIED_BESIDE_OTHERS = (129, 141, 142, 144, 200, 251, 297, 314, 424)


def _op(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("HBBI", code, yes, no, value)


def _fail(number: int) -> bytes:
    return _op(_RETURN, 0x00050000 | number)


def _argument(index: int) -> bytes:
    return _op(_LOAD, _ARGS_OFFSET + 8 * index)


def _when(nr: int, body: list[bytes]) -> list[bytes]:
    """For the call `nr`, run `body`, which must return."""
    return [_op(_EQUAL, nr, 0, len(body)), *body]


def _only_if(index: int, values: Iterable[int]) -> list[bytes]:
    """Allow if the argument is one of `values`, else fail."""
    tests = [op for v in values for op in (_op(_EQUAL, v, 0, 1), _op(_RETURN, _ALLOW))]
    return [_argument(index), *tests, _fail(errno.EPERM)]


def _unless(index: int, values: Iterable[int]) -> list[bytes]:
    """Fail if the argument is one of `values`, else allow."""
    tests = [op for v in values for op in (_op(_EQUAL, v, 0, 1), _fail(errno.EPERM))]
    return [_argument(index), *tests, _op(_RETURN, _ALLOW)]


def program(*, threads_only: bool, pid: int) -> bytes:
    """Return the filter for the process `pid`."""
    ops = [
        _op(_LOAD, _ARCH_OFFSET),
        _op(_EQUAL, _ARCH_X86_64, 1, 0),
        _op(_RETURN, _KILL),
        _op(_LOAD, _NR_OFFSET),
        _op(_AT_LEAST, _X32_BIT, 0, 1),
        _fail(errno.EPERM),
        *_when(_NR_CLONE3, [_fail(errno.ENOSYS)]),
        *_when(_NR_PRCTL, _unless(0, [_PR_SET_PDEATHSIG])),
        *_when(_NR_IOCTL, _unless(1, [_TIOCSTI, _TIOCLINUX])),
        *_when(_NR_PRLIMIT64, _only_if(0, [0, pid])),
        *_when(
            _NR_CLONE,
            [
                _argument(0),
                _op(_ANY_BIT, _CLONE_NAMESPACES, 0, 1),
                _fail(errno.EPERM),
                *(
                    [_op(_ANY_BIT, _CLONE_THREAD, 1, 0), _fail(errno.EPERM)]
                    if threads_only
                    else []
                ),
                _op(_RETURN, _ALLOW),
            ],
        ),
    ]
    denied = [nr for group in _DENIED.values() for nr in group]
    if threads_only:
        denied += [_NR_FORK, _NR_VFORK, *_DENIED_BESIDE_OTHERS]
        ops += _when(_NR_KILL, _only_if(0, [pid])) + _when(_NR_TGKILL, _only_if(0, [pid]))
    for nr in denied:
        ops += _when(nr, [_fail(errno.EPERM)])
    return b"".join([*ops, _op(_RETURN, _ALLOW)])


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def restrict(*, threads_only: bool) -> None:
    """Install the filter, for this thread and all that it starts, for ever.

    Raises:
        OSError: the kernel refuses, or this is no x86_64.
    """
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    code = program(threads_only=threads_only, pid=os.getpid())
    prog = _Program(length=len(code) // 8, code=code)
    result = syscalls.libc().prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(prog), 0, 0
    )
    syscalls.check(result, "seccomp")
