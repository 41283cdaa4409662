"""The filter, run by a small interpreter of BPF instead of the kernel."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.worker.engine.walls import denied
from edif_hpc.worker.engine.walls.seccomp import program

ALLOWED, KILLED, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
PRETENDED = 0x00050000
X86_64 = 0xC000003E
PID = 4321


def run(code: bytes, nr: int, *arguments: int, arch: int = X86_64) -> int:
    data = struct.pack("=IIQ6Q", nr, arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    ops = list(struct.iter_unpack("HBBI", code))
    at = accumulator = 0
    while True:
        op, yes, no, value = ops[at]
        at += 1
        match op:
            case 0x20:
                accumulator = struct.unpack_from("=I", data, value)[0]
            case 0x15:
                at += yes if accumulator == value else no
            case 0x35:
                at += yes if accumulator >= value else no
            case 0x45:
                at += yes if accumulator & value else no
            case 0x54:
                accumulator &= value
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"unknown op {op:#x}")


FULL = program(threads_only=False, device=False, pid=PID)
BESIDE = program(threads_only=True, device=False, pid=PID)
THREAD = 0x3D0F00
FORK = 0x01200011


@pytest.mark.parametrize(
    ("nr", "arguments", "full", "beside"),
    [
        (0, (), ALLOWED, ALLOWED),  # read
        (59, (), ALLOWED, ALLOWED),  # execve
        (41, (2, 1, 0), EPERM, EPERM),  # socket
        (53, (1, 1), ALLOWED, ALLOWED),  # socketpair of local streams
        (53, (1, 0x80801), ALLOWED, ALLOWED),  # with SOCK_CLOEXEC and SOCK_NONBLOCK
        (53, (1, 5), ALLOWED, ALLOWED),  # SOCK_SEQPACKET
        (53, (1, 2), EPERM, EPERM),  # SOCK_DGRAM, which can be spoken from to any socket
        (53, (1, 3), EPERM, EPERM),  # SOCK_RAW, which is the same
        (53, (30, 1), EPERM, EPERM),  # AF_TIPC
        (44, (3, 0, 9), ALLOWED, ALLOWED),  # sendto nobody in particular
        (44, (3, 0, 9, 0, 0x7F00_0000_1000), EPERM, EPERM),
        (44, (3, 0, 9, 0, 0x7F00_0000_0000), EPERM, EPERM),  # the lower half of that address is 0
        (46, (3,), EPERM, EPERM),  # sendmsg
        (319, (), EPERM, EPERM),  # memfd_create
        (101, (), EPERM, EPERM),  # ptrace
        (425, (), EPERM, EPERM),  # io_uring_setup
        (435, (), ENOSYS, ENOSYS),  # clone3
        (56, (THREAD,), ALLOWED, ALLOWED),
        (56, (FORK,), ALLOWED, EPERM),
        (56, (THREAD | 0x10000000,), EPERM, EPERM),  # a user namespace
        (57, (), ALLOWED, EPERM),  # fork
        (62, (PID, 9), ALLOWED, ALLOWED),  # kill
        (62, (1, 9), ALLOWED, EPERM),
        (234, (PID, 5, 6), ALLOWED, ALLOWED),  # tgkill
        (234, (1, 1, 6), ALLOWED, EPERM),
        (157, (1, 0), EPERM, EPERM),  # PR_SET_PDEATHSIG
        (157, (4, 0), EPERM, EPERM),  # PR_SET_DUMPABLE
        (157, (35,), EPERM, EPERM),  # PR_SET_MM
        (157, (0x59616D61,), EPERM, EPERM),  # PR_SET_PTRACER
        (157, (15,), ALLOWED, ALLOWED),  # PR_SET_NAME
        (157, (22,), ALLOWED, ALLOWED),  # PR_SET_SECCOMP: more walls
        (302, (0,), ALLOWED, ALLOWED),  # prlimit64 of oneself
        (302, (1,), EPERM, EPERM),
        (16, (0, 0x5412), EPERM, EPERM),  # TIOCSTI
        (16, (0, 0x5401), ALLOWED, ALLOWED),
        (16, (0, 0x8901), ALLOWED, EPERM),  # FIOSETOWN
        (72, (0, 8, 1), ALLOWED, EPERM),  # F_SETOWN: whom a file's signals go to
        (72, (0, 10, 9), ALLOWED, EPERM),  # F_SETSIG, and which those are
        (72, (0, 1), ALLOWED, ALLOWED),  # F_GETFD
        (203, (0,), ALLOWED, ALLOWED),  # sched_setaffinity
        (203, (1,), ALLOWED, EPERM),
        (72, (0, 1024), EPERM, EPERM),  # F_SETLEASE: others have to wait
        (72, (0, 1040), EPERM, EPERM),  # F_SETDELEG, the same of Linux 6.19
        (436, (3, 9, 0), ALLOWED, ALLOWED),  # close_range
        (436, (3, 9, 2), EPERM, EPERM),  # CLOSE_RANGE_UNSHARE: descriptors of one thread
        (56, (0x00010900,), EPERM, EPERM),  # clone: a thread without CLONE_FILES
        (16, (0, 0x40086602), ALLOWED, EPERM),  # FS_IOC_SETFLAGS
        (90, (), ALLOWED, PRETENDED),  # chmod
        (280, (0, 0, 0x7F00_0000_0000), ALLOWED, PRETENDED),  # utimensat
        (
            280,
            (0, 0, 0),
            ALLOWED,
            EPERM,
        ),  # utimensat of now, which is how `Path.touch` asks whether a file is there
        (260, (), ALLOWED, EPERM),  # fchownat
        (254, (), EPERM, EPERM),  # inotify_add_watch
        (434, (1,), ALLOWED, EPERM),  # pidfd_open
        (444, (), ALLOWED, ALLOWED),  # landlock_create_ruleset: more walls
        (462, (), ALLOWED, ALLOWED),  # mseal
        (denied.NEWEST + 1, (), ENOSYS, ENOSYS),  # nobody has looked at it
    ],
)
def test_what_the_filter_says(nr: int, arguments: tuple[int, ...], full: int, beside: int) -> None:
    assert run(FULL, nr, *arguments) == full
    assert run(BESIDE, nr, *arguments) == beside


def test_other_tables_of_calls_are_no_way_around() -> None:
    assert run(FULL, 0, arch=0x40000003) == KILLED  # i386
    assert run(FULL, 0x40000000 | 41) == EPERM  # x32


def test_a_driver_may_have_files_in_memory() -> None:
    code = program(threads_only=False, device=True, pid=PID)
    assert run(code, denied.WITHOUT_DEVICE["memfd_create"]) == ALLOWED
    assert run(code, 41) == EPERM


def test_the_numbers_are_those_of_the_kernel() -> None:
    """As far as the headers of this machine know the calls."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        absent("no headers of x86_64 here")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    tables = (
        *denied.ALWAYS.values(),
        denied.BESIDE_OTHERS,
        denied.SILENT_BESIDE_OTHERS,
        denied.OWNERS_BESIDE_OTHERS,
        denied.WITHOUT_DEVICE,
    )
    ours = {name: number for table in tables for name, number in table.items()}
    assert {name: int(known.get(name, number)) for name, number in ours.items()} == ours
    assert len(set(ours.values())) == len(ours) == sum(map(len, tables))
