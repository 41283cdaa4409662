"""The few Linux calls that Python 3.11 does not offer, as functions that raise `OSError`.

Only for x86_64 and aarch64 numbers that are the same on both (everything newer than 2018 is); the one
older call, `pivot_root`, is not needed. Nothing here decides anything: `jail` does.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import platform
from pathlib import Path
from types import MappingProxyType

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_NOEXEC = 0x8
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000

MOUNT_ATTR_RDONLY = 0x1
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_COLLAPSE = 25

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_PR_CAP_AMBIENT = 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_CAPABILITY_VERSION_3 = 0x20080522
_SYS_KEYCTL = MappingProxyType({"x86_64": 250, "aarch64": 219})
_KEYCTL_JOIN_SESSION_KEYRING = 1


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library of this process."""
    return ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """Return `result`, or raise what errno says if it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *arguments: int, what: str) -> None:
    """Call `prctl(2)`."""
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    check(libc().prctl(option, *padded), what)


def unshare(flags: int) -> None:
    """Leave the namespaces in `flags` for new ones."""
    check(libc().unshare(flags), f"unshare({flags:#x})")


def setns(fd: int, kind: int) -> None:
    """Enter the namespace that `fd` stands for."""
    check(libc().setns(fd, kind), f"setns({kind:#x})")


def mount(source: str, target: Path, fstype: str | None, flags: int, options: str = "") -> None:
    """Call `mount(2)`."""
    kind = None if fstype is None else fstype.encode()
    how = (ctypes.c_ulong(flags), options.encode() or None)
    result = libc().mount(source.encode(), bytes(target), kind, *how)
    check(result, f"mount {source} on {target}")


class _MountAttr(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def mount_setattr(
    target: Path, *, on: int = 0, off: int = 0, propagation: int = 0, recursive: bool = False
) -> None:
    """Change the attributes of a mount, or of all below it (kernel 5.12)."""
    attr = _MountAttr(attr_set=on, attr_clr=off, propagation=propagation)
    result = libc().syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_int(_AT_FDCWD),
        bytes(target),
        ctypes.c_uint(_AT_RECURSIVE if recursive else 0),
        ctypes.byref(attr),
        ctypes.c_size_t(ctypes.sizeof(attr)),
    )
    check(result, f"mount_setattr {target}")


def die_with_parent() -> None:
    """Ask for SIGKILL when the thread that forked this process ends; lost on a change of credentials."""
    prctl(_PR_SET_PDEATHSIG, 9, what="PR_SET_PDEATHSIG")


def no_new_privs() -> None:
    """Give up, for good, gaining anything by executing a program."""
    prctl(_PR_SET_NO_NEW_PRIVS, 1, what="PR_SET_NO_NEW_PRIVS")


def drop_capabilities() -> None:
    """Give up every capability."""
    prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, what="PR_CAP_AMBIENT")
    set_capabilities(0)


def set_capabilities(word: int) -> None:
    """Have in each set those of the first 32 capabilities that `word` has, and no other."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(word, word, word, 0, 0, 0)
    check(libc().capset(header, sets), "capset")


def call(number: int, *arguments: int) -> int:
    """Make the system call `number` with plain numbers."""
    padded = [ctypes.c_long(a) for a in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    return check(libc().syscall(ctypes.c_long(number), *padded), f"system call {number}")


def leave_keyring() -> None:
    """Have a new, empty session keyring, where there are keyrings.

    Tickets for file systems of a site may lie in the session's. Where the call is refused, as in many containers, or there is
    no room for one more, nothing is lost: executors cannot make the call at all.
    """
    number = _SYS_KEYCTL.get(platform.machine())
    if number is None:
        return
    try:
        call(number, _KEYCTL_JOIN_SESSION_KEYRING)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EDQUOT}:
            raise


def madvise(address: int, length: int, advice: int) -> None:
    """Call `madvise(2)`."""
    result = libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
    check(result, f"madvise({advice})")
