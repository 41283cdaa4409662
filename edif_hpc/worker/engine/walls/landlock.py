"""Landlock: which files a process may touch, decided by the process itself, without root.

From `restrict` on every kind of access to files is denied except below the paths that a rule allows. It holds for the calling thread and what it starts later, for ever, so
it has to come before the first thread. Kernels differ in what they can handle: the ABI number says how
far, and a kernel without Landlock has the number 0.

Network ports (ABI 4) are handled without any rule, so TCP is denied; signals and abstract sockets to
the outside (ABI 6) likewise.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.worker.engine.walls import syscalls

_SYS_CREATE_RULESET = 444
_SYS_ADD_RULE = 445
_SYS_RESTRICT_SELF = 446
_VERSION_FLAG = 1
_RULE_PATH_BENEATH = 1

_EXECUTE = 1 << 0
_WRITE_FILE = 1 << 1
_READ_FILE = 1 << 2
_READ_DIR = 1 << 3
_TRUNCATE = 1 << 14
_IOCTL_DEVICE = 1 << 15
#: How many kinds of file access each ABI handles: 13 in the first, then refer, truncate, ioctl_dev.
_ACCESS_BITS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}
_ACCESS_BITS_NOW = 16
_NET_TCP = 0b11
_SCOPES = 0b11

ALL = (1 << _ACCESS_BITS_NOW) - 1
READ = _EXECUTE | _READ_FILE | _READ_DIR
DEVICE = _READ_FILE | _WRITE_FILE
#: A driver is spoken to by ioctl, and its nodes may lie in a folder.
DRIVER = DEVICE | _IOCTL_DEVICE | _READ_DIR
#: What makes sense on a path that is no folder.
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEVICE


def abi() -> int:
    """Return the kernel's Landlock version, 0 for none."""
    result = syscalls.libc().syscall(
        ctypes.c_long(_SYS_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG)
    )
    return max(int(result), 0)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Access to what lies below a path, which `fd` holds open without opening it."""

    fd: int
    access: int


def rules(paths: Iterable[Path], access: int) -> Iterator[Rule]:
    """Yield a rule for each of `paths` that exists."""
    for path in paths:
        with suppress(FileNotFoundError, PermissionError, NotADirectoryError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
            yield Rule(fd=fd, access=access if is_folder else access & _ON_FILES)


def restrict(allowed: Iterable[Rule]) -> None:
    """Deny, to this thread and all that it starts, whatever is not allowed, for ever."""
    version = abi()
    handled = (1 << _ACCESS_BITS.get(version, _ACCESS_BITS_NOW)) - 1
    attr = struct.pack(
        "QQQ", handled, _NET_TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
    )
    size = 8 if version < 4 else 16 if version < 6 else 24
    syscall = syscalls.libc().syscall
    nothing = ctypes.c_uint(0)
    ruleset = syscalls.check(
        syscall(ctypes.c_long(_SYS_CREATE_RULESET), attr, ctypes.c_size_t(size), nothing),
        "landlock_create_ruleset",
    )
    beneath = ctypes.c_int(_RULE_PATH_BENEATH)
    for rule in allowed:
        path = struct.pack("=Qi", rule.access & handled, rule.fd)
        added = syscall(
            ctypes.c_long(_SYS_ADD_RULE), ctypes.c_int(ruleset), beneath, path, nothing
        )
        syscalls.check(added, "landlock_add_rule")
    result = syscall(ctypes.c_long(_SYS_RESTRICT_SELF), ctypes.c_int(ruleset), nothing)
    os.close(ruleset)
    syscalls.check(result, "landlock_restrict_self")
