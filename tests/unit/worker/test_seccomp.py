"""The filter, run by a small interpreter of BPF instead of the kernel."""

from __future__ import annotations

import struct

import pytest

from edif_hpc.worker.engine.seccomp import program

ALLOWED, KILLED, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
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
            case 0x06:
                return int(value)
            case _:
                raise AssertionError(f"unknown op {op:#x}")


FULL = program(threads_only=False, pid=PID)
BESIDE = program(threads_only=True, pid=PID)
THREAD = 0x3D0F00
FORK = 0x01200011


@pytest.mark.parametrize(
    ("nr", "arguments", "full", "beside"),
    [
        (0, (), ALLOWED, ALLOWED),  # read
        (59, (), ALLOWED, ALLOWED),  # execve
        (41, (2, 1, 0), EPERM, EPERM),  # socket
        (53, (), ALLOWED, ALLOWED),  # socketpair
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
        (157, (15,), ALLOWED, ALLOWED),  # PR_SET_NAME
        (302, (0,), ALLOWED, ALLOWED),  # prlimit64 of oneself
        (302, (1,), EPERM, EPERM),
        (16, (0, 0x5412), EPERM, EPERM),  # TIOCSTI
        (16, (0, 0x5401), ALLOWED, ALLOWED),
    ],
)
def test_what_the_filter_says(nr: int, arguments: tuple[int, ...], full: int, beside: int) -> None:
    assert run(FULL, nr, *arguments) == full
    assert run(BESIDE, nr, *arguments) == beside


def test_other_tables_of_calls_are_no_way_around() -> None:
    assert run(FULL, 0, arch=0x40000003) == KILLED  # i386
    assert run(FULL, 0x40000000 | 41) == EPERM  # x32
