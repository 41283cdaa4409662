"""Which system calls of x86_64 Linux executors may not make: the table behind `seccomp`.

It began as the union of what Docker denies to a container by default and what systemd's groups @clock, @cpu-emulation, @debug,
@keyring, @module, @mount, @obsolete, @raw-io, @reboot and @swap hold, and has what Linux brought since, up to 6.18. Numbers are those of
the kernel's own table (arch/x86/entry/syscalls/syscall_64.tbl) and never change.

Not here, and so allowed: whatever touches nothing but the caller (memory, threads, signals, files that it may open, more Landlock
and seccomp). A call that is newer than the table fails as on a kernel that lacks it, which every library is prepared for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

#: The newest call that somebody has looked at: `file_setattr` of Linux 6.17.
NEWEST: Final = 469

ALWAYS: Final[Mapping[str, Mapping[str, int]]] = {
    # The one socket that an executor needs is open. `socketpair` stays for asyncio, see `seccomp`.
    "sockets": {"socket": 41, "connect": 42, "accept": 43, "bind": 49, "listen": 50, "accept4": 288},
    # They can carry descriptors, which then count for nobody, and an address.
    "messages": {"sendmsg": 46, "sendmmsg": 307},
    "other processes": {
        "ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "pidfd_getfd": 438,
        "process_madvise": 440, "process_mrelease": 448,
    },
    "memory of others": {"migrate_pages": 256, "move_pages": 279},
    "mounts": {
        "pivot_root": 155, "chroot": 161, "mount": 165, "umount2": 166, "open_tree": 428, "move_mount": 429, "fsopen": 430,
        "fsconfig": 431, "fsmount": 432, "fspick": 433, "mount_setattr": 442, "statmount": 457, "listmount": 458,
        "open_tree_attr": 467,
    },
    "namespaces": {"unshare": 272, "setns": 308},
    # They tell what others do with files, also with such as Landlock lets nobody open.
    "notice of files": {
        "inotify_init": 253, "inotify_add_watch": 254, "inotify_init1": 294, "fanotify_init": 300, "fanotify_mark": 301,
    },
    "keys": {"add_key": 248, "request_key": 249, "keyctl": 250},
    # Large, rarely used parts of the kernel, where most of its holes were.
    "kernel surface": {
        "lookup_dcookie": 212, "perf_event_open": 298, "name_to_handle_at": 303,
        "open_by_handle_at": 304, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426,
        "io_uring_register": 427, "memfd_secret": 447, "map_shadow_stack": 453, "lsm_get_self_attr": 459,
        "lsm_set_self_attr": 460, "lsm_list_modules": 461,
    },
    "kernel": {
        "syslog": 103, "_sysctl": 156, "create_module": 174, "init_module": 175, "delete_module": 176, "get_kernel_syms": 177,
        "query_module": 178, "kexec_load": 246, "finit_module": 313, "kexec_file_load": 320,
    },
    "machine": {
        "vhangup": 153, "modify_ldt": 154, "adjtimex": 159, "acct": 163, "settimeofday": 164, "swapon": 167, "swapoff": 168,
        "reboot": 169, "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "quotactl": 179,
        "clock_settime": 227, "clock_adjtime": 305, "quotactl_fd": 443,
    },
    "obsolete": {
        "uselib": 134, "personality": 135, "ustat": 136, "sysfs": 139, "nfsservctl": 180, "afs_syscall": 183, "tuxcall": 184,
        "security": 185, "vserver": 236,
    },
    # Objects of the machine's own, which outlive the process that made them.
    "System V IPC and message queues": {
        "shmget": 29, "shmat": 30, "shmctl": 31, "semget": 64, "semop": 65, "semctl": 66, "shmdt": 67, "msgget": 68,
        "msgsnd": 69, "msgrcv": 70, "msgctl": 71, "semtimedop": 220, "mq_open": 240, "mq_unlink": 241, "mq_timedsend": 242,
        "mq_timedreceive": 243, "mq_notify": 244, "mq_getsetattr": 245,
    },
}  # fmt: skip

#: Denied as well where executors share a PID namespace with others of the same user, whom these could reach.
BESIDE_OTHERS: Final[Mapping[str, int]] = {
    "fork": 57, "vfork": 58, "rt_sigqueueinfo": 129, "setpriority": 141, "sched_setparam": 142, "sched_setscheduler": 144,
    "tkill": 200, "ioprio_set": 251, "rt_tgsigqueueinfo": 297, "sched_setattr": 314, "pidfd_send_signal": 424, "pidfd_open": 434,
}  # fmt: skip

#: A file of memory that no mapping shows, so nobody could count it. Drivers of GPUs use some.
WITHOUT_DEVICE: Final[Mapping[str, int]] = {"memfd_create": 319}

#: Landlock does not rule over what is *said* of a file: without a mount that is read-only, its modes, times, owners and attributes could be
#: changed by every process of its user, also those of the model and of the worker's own folder. Libraries set modes and times of what they
#: have just written (`shutil.copy`), and have no use for a refusal: those calls do nothing, and say that they did.
SILENT_BESIDE_OTHERS: Final[Mapping[str, int]] = {
    "chmod": 90, "fchmod": 91, "fchmodat": 268, "fchmodat2": 452, "utime": 132, "utimes": 235, "futimesat": 261, "utimensat": 280,
}  # fmt: skip
OWNERS_BESIDE_OTHERS: Final[Mapping[str, int]] = {
    "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "setxattr": 188, "lsetxattr": 189, "fsetxattr": 190,
    "removexattr": 197, "lremovexattr": 198, "fremovexattr": 199, "setxattrat": 463, "removexattrat": 466, "file_setattr": 469,
}  # fmt: skip
