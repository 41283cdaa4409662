"""The walls around an executor, put up in the one order that holds, and probed by putting them up.

Landlock and seccomp bind only the thread that asks for them, and a new user namespace is refused to a
process with two threads. So an executor is locked up directly after the fork, before any thread, any
compute and any request, and every step first makes sure that it is still alone in its process:

    zygote, at birth      a user and a PID namespace of its own (so that it may make the others)
    zygote, when loaded   mounts read-only but for scratch, no network any more, no keys of the session
    for each executor     a new PID namespace, then fork: the child is its process 1
      mounts              its own copy of the mounts, its own IPC
      scratch             a file system in memory, of bounded size, over its own folder
      shm                 a /dev/shm that lies in there
      proc                a /proc that shows only itself
      user                one more user namespace, so that process counts are its own
      session             no terminal, and no process group that others are in
      privileges          no capability left, none to be gained
      limits              open files, processes, no core; the first one to end when memory runs out
      parent              SIGKILL when the zygote dies (and a look whether it has died already)
      landlock            files: libraries and the model to read, its own folder to write
      seccomp             system calls

A level without namespaces leaves out the steps that need them. `probing` finds the strongest level by going the whole way in a
throw-away process and trying to escape from there.

An executor stays *dumpable*, that is: readable for processes of the same user, because the worker watches its memory (`watch`).
Other executors do not come near: at the full level they do not see it, and a process under Landlock reads only those that it
has started.
"""

from __future__ import annotations

import os
import resource
import select
import site
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from edif_hpc.errors import EngineError
from edif_hpc.worker.engine.values import Level, Limits
from edif_hpc.worker.engine.walls import landlock, seccomp, syscalls

OPEN_FILES = 1024
#: Processes and threads.
PROCESSES = 1024
#: In an executor's folder; each costs the kernel memory, however small it is.
FILES = 65_536
SCRATCH_BYTES = Limits().scratch_bytes
LOCKED_BYTES = 64 << 20
#: Without a user namespace threads are counted together with the worker's and pilot's; so many are left to those.
RESERVED = 256

#: What is shared with other processes of this user is small, so that those have theirs. A core of 1 byte is none, and as the
#: kernel takes it also none for a program that collects them, which a 0 would not stop.
_LIMITS = MappingProxyType({
    resource.RLIMIT_CORE: 1,
    resource.RLIMIT_NOFILE: OPEN_FILES,
    resource.RLIMIT_SIGPENDING: 1024,
    resource.RLIMIT_MSGQUEUE: 0,
    resource.RLIMIT_NICE: 0,
    resource.RLIMIT_RTPRIO: 0,
})  # fmt: skip

_SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/sys/devices/system",
    # How much of the CPUs the cgroup allows: what counts them asks for it, and fails if it is there and cannot be read.
    "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us",
    "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/localtime", "/etc/timezone",
    "/etc/mime.types", "/etc/fonts", "/etc/ssl/certs", "/etc/passwd", "/etc/group",
    "/etc/nsswitch.conf", "/etc/alternatives",
    "/.singularity.d/libs",  # what Apptainer brings of the host's driver
)  # fmt: skip
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
#: What a GPU's driver is reached by, of either vendor. Which of the nodes may be opened is for the node's cgroup to say.
_DRIVER_NODES = ("nvidia*", "kfd", "dri")
#: Where the driver's libraries read what there is, and how it is connected.
_DRIVER_FACTS = ("/sys", "/proc/driver/nvidia", "/proc/devices", "/proc/modules")
#: Where POSIX shared memory is, and where in an executor's folder its own is.
_SHM, _SHM_BELOW = Path("/dev/shm"), ".shm"  # noqa: S108 - it is replaced, not used
#: Of a /proc shared with others: only what says nothing about them.
_PROC = ("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/filesystems", "/proc/sys/vm")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """Which walls are used; `level` is what they amount to."""

    namespaces: bool
    landlock: bool
    seccomp: bool

    @property
    def level(self) -> Level:
        """The level that these walls reach."""
        if not (self.landlock and self.seccomp):
            return Level.PROCESS
        return Level.FULL if self.namespaces else Level.NO_NAMESPACES


#: Strongest first.
CHOICES = (
    Layers(namespaces=True, landlock=True, seccomp=True),
    Layers(namespaces=False, landlock=True, seccomp=True),
    Layers(namespaces=False, landlock=False, seccomp=True),
    Layers(namespaces=False, landlock=False, seccomp=False),
)


class Jail:
    """The walls of one zygote and its executors."""

    def __init__(self, layers: Layers) -> None:
        """Make the zygote's own walls: first thing in its life, and only there."""
        self.layers = layers
        if layers.namespaces:
            _be_alone("namespaces of the zygote")
            _new_user_namespace()
            _become_first_process()
            self._pid_namespace = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        self._self = os.pidfd_open(os.getpid())
        self._rules: list[landlock.Rule] = []
        self._device = False
        self._scratch, self._scratch_bytes = Path(), 0

    def shut(
        self,
        scratch: Path,
        readable: Iterable[Path] = (),
        *,
        gpu: bool = False,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> None:
        """Settle, now that the zygote has loaded, what executors may read: libraries and `readable`.

        With `gpu` they may also use the nodes of its driver. A folder of theirs takes `scratch_bytes` at most.
        The zygote itself loses the network, the keys of its session, and all writing but in `scratch`.
        """
        self._device, self._scratch, self._scratch_bytes = gpu, scratch, scratch_bytes
        syscalls.leave_keyring()
        # Started from a folder with everything in it, Python looks for modules there.
        python = [each for each in _python() if not scratch.is_relative_to(each)]
        self._rules += landlock.rules([*map(Path, _SYSTEM), *python, *readable], landlock.READ)
        self._rules += landlock.rules(map(Path, _DEVICES), landlock.DEVICE)
        if gpu:
            self._rules += landlock.rules(driver_nodes(), landlock.DRIVER)
            self._rules += landlock.rules(map(Path, _DRIVER_FACTS), landlock.READ)
        if not self.layers.namespaces:
            return
        root = Path("/")
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
        syscalls.mount("none", root, None, syscalls.MS_REC | syscalls.MS_PRIVATE)
        syscalls.mount(str(scratch), scratch, None, syscalls.MS_BIND)
        syscalls.mount_setattr(root, on=syscalls.MOUNT_ATTR_RDONLY, recursive=True)
        syscalls.mount_setattr(scratch, off=syscalls.MOUNT_ATTR_RDONLY)

    def fork(self) -> int:
        """Fork as `os.fork` does; at the full level the child is process 1 of a new PID namespace."""
        if not self.layers.namespaces:
            return os.fork()
        syscalls.unshare(syscalls.CLONE_NEWPID)
        pid = os.fork()
        if pid:
            syscalls.setns(self._pid_namespace, syscalls.CLONE_NEWPID)
        return pid

    def steps(self, folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield the steps of an executor's confinement, by name and in order."""
        if self.layers.namespaces:
            yield "mounts", lambda: syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWIPC)
            yield "scratch", lambda: _mount_scratch(folder, self._scratch, self._scratch_bytes)
            yield "shm", lambda: _mount_shm(folder)
            yield "proc", _mount_proc
            yield "user", _new_user_namespace
        yield "session", os.setsid
        yield "privileges", _give_up_privileges
        yield "limits", self._set_limits
        yield "parent", self._follow_zygote
        if self.layers.landlock:
            yield "landlock", lambda: self._confine_files(folder)
        if self.layers.seccomp:
            yield "seccomp", self._restrict_calls

    def enter(self, folder: Path) -> list[str]:
        """Lock this process up for good, with `folder` to write in; return the steps taken.

        Raises:
            EngineError: there is a second thread, which no wall would bind.
            OSError: the kernel refuses a step.
        """
        taken = []
        os.umask(0o077)
        os.chdir(folder)
        for name, step in self.steps(folder):
            _be_alone(name)
            step()
            taken.append(name)
        return taken

    def _set_limits(self) -> None:
        _set_limits(own_user=self.layers.namespaces, device=self._device)

    def _restrict_calls(self) -> None:
        seccomp.restrict(threads_only=not self.layers.namespaces, device=self._device)

    def _follow_zygote(self) -> None:
        """Die with the zygote. This comes after the last change of credentials, which would undo it."""
        follow(self._self)

    def _confine_files(self, folder: Path) -> None:
        proc = ["/proc"] if self.layers.namespaces else _PROC
        own = [
            *landlock.rules(map(Path, proc), landlock.READ),
            *landlock.rules([folder, folder / _SHM_BELOW], landlock.ALL),
        ]
        landlock.restrict([*self._rules, *own])
        for rule in own:
            os.close(rule.fd)


def follow(parent: int) -> None:
    """Die with the parent, which `parent` stands for; at once, if it is dead already."""
    syscalls.die_with_parent()
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def confine(readable: Iterable[Path], *, gpu: bool) -> None:
    """Lock up, for good, a program of ours that runs nobody's code and starts no processes: the holder of weights.

    Beside what executors may use it writes to /dev/shm, where torch counts the users of a handle.
    """
    _be_alone("walls of the holder")
    _give_up_privileges()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    allowed = [
        *landlock.rules(
            [*map(Path, _SYSTEM), *_python(), *readable, Path("/proc")], landlock.READ
        ),
        *landlock.rules(map(Path, _DEVICES), landlock.DEVICE),
        *landlock.rules([_SHM], landlock.ALL),
    ]
    if gpu:
        allowed += landlock.rules(driver_nodes(), landlock.DRIVER)
        allowed += landlock.rules(map(Path, _DRIVER_FACTS), landlock.READ)
    landlock.restrict(allowed)
    seccomp.restrict(threads_only=True, device=True)
    for rule in allowed:
        os.close(rule.fd)


@contextmanager
def in_child(fork: Callable[[], int]) -> Iterator[str | None]:
    """Run the body in a child (which gets `None`), and then in the parent with the child's complaint.

    The child never leaves the context. The parent gets an empty string if all went well.
    """
    read, write = os.pipe()
    pid = fork()
    if pid == 0:
        status = 1
        try:
            yield None
            status = 0
        except BaseException as error:  # noqa: BLE001 - it is told to the parent, whatever it is
            os.write(write, f"{error}".encode()[:1000])
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        complaint = pipe.read().decode(errors="replace")
    _, status = os.waitpid(pid, 0)
    yield complaint or ("" if status == 0 else f"the probe ended with wait status {status}")


def _be_alone(step: str) -> None:
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208 - the cheap way, once per step
    if threads != 1:
        raise EngineError(f"{threads} threads before the step {step!r}; it would bind only one")


def _new_user_namespace() -> None:
    """Enter a new user namespace in which this user and group are known by the same numbers."""
    uid, gid = os.geteuid(), os.getegid()
    syscalls.unshare(syscalls.CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _become_first_process() -> None:
    """Go on as process 1 of a new PID namespace, under a stub that only waits.

    A process may make PID namespaces for its children again and again only if it can come back to its
    own, and it can come back only to one that its own user namespace owns. A second gain: when the
    zygote dies, the kernel ends all that it forked.
    """
    stub = os.pidfd_open(os.getpid())
    syscalls.unshare(syscalls.CLONE_NEWPID)
    pid = os.fork()
    if pid:
        os.closerange(3, 1 << 20)
        _, status = os.waitpid(pid, 0)
        os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status))
    follow(stub)
    os.close(stub)


def _mount_scratch(folder: Path, scratch: Path, size: int) -> None:
    """Put a file system over the folder that is as large as its files may be, and is gone with the last who sees it.

    What lies around it is others': from here on it is read-only, also for modes and owners, of which Landlock knows nothing.
    """
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV
    options = f"size={size},nr_inodes={FILES},mode=0700"
    syscalls.mount("scratch", folder, "tmpfs", flags, options)
    os.chdir(folder)  # the working directory was the one below
    syscalls.mount_setattr(scratch, on=syscalls.MOUNT_ATTR_RDONLY)


def _mount_shm(folder: Path) -> None:
    """Lead /dev/shm into the executor's folder: the semaphores of multiprocessing and joblib lie there."""
    if not _SHM.is_dir():
        return
    own = folder / _SHM_BELOW
    own.mkdir(mode=0o700, exist_ok=True)
    syscalls.mount(str(own), _SHM, None, syscalls.MS_BIND)


def _mount_proc() -> None:
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("proc", Path("/proc"), "proc", flags)


def _give_up_privileges() -> None:
    syscalls.drop_capabilities()
    syscalls.no_new_privs()


def _set_limits(*, own_user: bool, device: bool) -> None:
    """Limit what is not the job's to say, and what it shares with all processes of this user."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # to be ended before worker and pilot
    limits = dict(_LIMITS)
    if not device:  # a driver locks what it transfers
        limits[resource.RLIMIT_MEMLOCK] = LOCKED_BYTES
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if own_user:
        limits[resource.RLIMIT_NPROC] = PROCESSES
    elif hard > 2 * RESERVED:
        limits[resource.RLIMIT_NPROC] = hard - RESERVED
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def driver_nodes(dev: Path = Path("/dev")) -> list[Path]:
    """Return the nodes by which the driver of a GPU is reached."""
    return [path for pattern in _DRIVER_NODES for path in sorted(dev.glob(pattern))]


def _python() -> list[Path]:
    """Where this Python and this package live."""
    package = Path(__file__).parents[3]
    places = [sys.prefix, sys.base_prefix, *site.getsitepackages(), *sys.path]
    return [package, *(Path(p) for p in places if p and Path(p) != package.parent)]
