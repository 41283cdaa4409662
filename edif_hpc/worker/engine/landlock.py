"""Landlock: which files a process may touch, decided by the process itself, without root.

A ruleset names the kinds of access it handles; from `restrict` on, each of them is denied except below
the folders that a rule allows. It holds for the calling thread and what it starts later, for ever, so
it has to come before the first thread. Kernels differ in what they can handle: the ABI number says how
far, and a kernel without Landlock has the number 0.

Network ports (ABI 4) are handled without any rule, so TCP is denied; signals and abstract sockets to
the outside (ABI 6) likewise.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from edif_hpc.worker.engine import syscalls

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
#: How many kinds of file access each ABI handles: 13 in the first, then refer, truncate, ioctl_dev.
_ACCESS_BITS = {0: 0, 1: 13, 2: 14, 3: 15, 4: 15}
_ACCESS_BITS_NOW = 16
_NET_TCP = 0b11
_SCOPES = 0b11

READ = _EXECUTE | _READ_FILE | _READ_DIR
DEVICE = _READ_FILE | _WRITE_FILE
#: What makes sense on a path that is no folder.
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | (1 << 15)


def abi() -> int:
    """Return the kernel's Landlock version, 0 for none."""
    result = syscalls.libc().syscall(
        ctypes.c_long(_SYS_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint(_VERSION_FLAG)
    )
    return max(int(result), 0)


class Ruleset:
    """Rules in the making; `restrict` makes them hold."""

    def __init__(self) -> None:
        version = abi()
        bits = _ACCESS_BITS.get(version, _ACCESS_BITS_NOW)
        self._handled = (1 << bits) - 1
        attr = struct.pack(
            "QQQ", self._handled, _NET_TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0
        )
        size = 8 if version < 4 else 16 if version < 6 else 24
        self._fd = syscalls.check(
            syscalls.libc().syscall(
                ctypes.c_long(_SYS_CREATE_RULESET), attr, ctypes.c_size_t(size), ctypes.c_uint(0)
            ),
            "landlock_create_ruleset",
        )

    def allow(self, paths: Iterable[Path], access: int) -> None:
        """Allow `access` on and below those of `paths` that exist."""
        for path in paths:
            try:
                fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError, NotADirectoryError):
                continue
            try:
                self._add(fd, access if path.is_dir() else access & _ON_FILES)
            finally:
                os.close(fd)

    def allow_all(self, path: Path) -> None:
        """Allow everything below `path`."""
        self.allow([path], self._handled)

    def restrict(self) -> None:
        """Make the rules hold, for this thread and all that it starts, for ever."""
        result = syscalls.libc().syscall(
            ctypes.c_long(_SYS_RESTRICT_SELF), ctypes.c_int(self._fd), ctypes.c_uint(0)
        )
        os.close(self._fd)
        syscalls.check(result, "landlock_restrict_self")

    def _add(self, fd: int, access: int) -> None:
        attr = struct.pack("=Qi", access & self._handled, fd)
        result = syscalls.libc().syscall(
            ctypes.c_long(_SYS_ADD_RULE),
            ctypes.c_int(self._fd),
            ctypes.c_int(_RULE_PATH_BENEATH),
            attr,
            ctypes.c_uint(0),
        )
        syscalls.check(result, "landlock_add_rule")
