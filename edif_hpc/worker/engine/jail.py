"""The walls around an executor, put up in the one order that holds, and probed by putting them up.

Landlock and seccomp bind only the thread that asks for them, and a new user namespace is refused to a
process with two threads. So an executor is locked up directly after the fork, before any thread, any
compute and any request, and every step first makes sure that it is still alone in its process:

    zygote, at birth      a user and a PID namespace of its own (so that it may make the others)
    zygote, when loaded   mounts read-only but for scratch, no network any more
    for each executor     a new PID namespace, then fork: the child is its process 1
      mounts              its own copy of the mounts, its own IPC
      proc                a /proc that shows only itself
      user                one more user namespace, so that process counts are its own
      privileges          no capability left, none to be gained
      limits              open files, processes, no core
      parent              SIGKILL when the zygote dies (and a look whether it has died already)
      landlock            files: libraries and the model to read, its own folder to write
      seccomp             system calls

A level without namespaces leaves out the steps that need them. `probe` finds the strongest level by
going the whole way in a throw-away process, because a kernel may grant a namespace and then refuse
every mount in it.
"""

from __future__ import annotations

import os
import resource
import select
import site
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.errors import EngineError, IsolationTooWeak
from edif_hpc.worker.engine import landlock, seccomp, syscalls
from edif_hpc.worker.engine.values import Level

OPEN_FILES = 1024
PROCESSES = 1024

_SYSTEM = (
    "/usr", "/lib", "/lib64", "/bin", "/sbin", "/opt", "/sys/devices/system",
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

    def shut(self, scratch: Path, readable: Iterable[Path] = (), *, gpu: bool = False) -> None:
        """Settle, now that the zygote has loaded, what executors may read: libraries and `readable`.

        With `gpu` they may also use the nodes of its driver.
        The zygote itself loses the network, and all writing but in `scratch`.
        """
        self._rules += landlock.rules([*map(Path, _SYSTEM), *_python(), *readable], landlock.READ)
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
            yield "proc", _mount_proc
            yield "user", _new_user_namespace
        yield "privileges", _give_up_privileges
        yield "limits", lambda: _set_limits(own_user=self.layers.namespaces)
        yield "parent", self._follow_zygote
        if self.layers.landlock:
            yield "landlock", lambda: self._confine_files(folder)
        if self.layers.seccomp:
            yield "seccomp", lambda: seccomp.restrict(threads_only=not self.layers.namespaces)

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

    def _follow_zygote(self) -> None:
        """Die with the zygote. This comes after the last change of credentials, which would undo it."""
        follow(self._self)

    def _confine_files(self, folder: Path) -> None:
        proc = ["/proc"] if self.layers.namespaces else _PROC
        own = [
            *landlock.rules(map(Path, proc), landlock.READ),
            *landlock.rules([folder], landlock.ALL),
        ]
        landlock.restrict([*self._rules, *own])
        for rule in own:
            os.close(rule.fd)


def follow(parent: int) -> None:
    """Die with the parent, which `parent` stands for; at once, if it is dead already."""
    syscalls.die_with_parent()
    if select.select([parent], [], [], 0)[0]:
        os._exit(1)


def probe(scratch: Path, *, ceiling: Level, floor: Level) -> tuple[Layers, tuple[str, ...]]:
    """Find the strongest walls that hold here, by trying, and at most `ceiling`.

    Returns them, and what stronger ones failed on.

    Raises:
        IsolationTooWeak: what works is below `floor`.
    """
    missing: list[str] = []
    for layers in CHOICES:
        if not ceiling.reaches(layers.level):
            continue
        refusal = _try(layers, scratch)
        if refusal is None:
            break
        missing.append(f"{layers.level}: {refusal}")
    else:
        raise EngineError(f"no executor can be started at all: {'; '.join(missing)}")
    if not layers.level.reaches(floor):
        raise IsolationTooWeak(
            f"executors can be confined at level {layers.level!s} here, below the floor "
            f"{floor!s} ({'; '.join(missing) or f'the ceiling is {ceiling!s}'}); lower the floor only "
            "for people who may read each other's work"
        )
    return layers, tuple(missing)


def _try(layers: Layers, scratch: Path) -> str | None:
    """Go the whole way to a confined child in a throw-away process; return what went wrong."""

    def executor(jail: Jail) -> None:
        jail.enter(scratch)
        if layers.landlock:
            _must_be_denied(
                lambda: os.close(os.open(scratch.parent, os.O_RDONLY)), "other folders"
            )
        if layers.seccomp:
            _must_be_denied(lambda: socket.socket().close(), "sockets")

    def zygote() -> None:
        jail = Jail(layers)
        jail.shut(scratch)
        with _in_child(jail.fork) as complaint:
            if complaint is None:
                executor(jail)
        if complaint:
            raise EngineError(complaint)

    with _in_child(os.fork) as complaint:
        if complaint is None:
            zygote()
    return complaint or None


@contextmanager
def _in_child(fork: Callable[[], int]) -> Iterator[str | None]:
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


def _must_be_denied(act: Callable[[], None], what: str) -> None:
    try:
        act()
    except PermissionError:
        return
    raise EngineError(f"{what} are not denied although the kernel took the rule")


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


def _mount_proc() -> None:
    flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
    syscalls.mount("proc", Path("/proc"), "proc", flags)


def _give_up_privileges() -> None:
    syscalls.drop_capabilities()
    syscalls.no_new_privs()


def _set_limits(*, own_user: bool) -> None:
    """Limit what is not the job's to say. A count of processes is only ours in our own namespace."""
    limits = {resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: OPEN_FILES}
    if own_user:
        limits[resource.RLIMIT_NPROC] = PROCESSES
    for kind, value in limits.items():
        hard = resource.getrlimit(kind)[1]
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (most, most))


def driver_nodes(dev: Path = Path("/dev")) -> list[Path]:
    """Return the nodes by which the driver of a GPU is reached."""
    return [path for pattern in _DRIVER_NODES for path in sorted(dev.glob(pattern))]


def _python() -> list[Path]:
    """Where this Python and this package live."""
    package = Path(__file__).parents[2]
    places = [sys.prefix, sys.base_prefix, *site.getsitepackages(), *sys.path]
    return [package, *(Path(p) for p in places if p and Path(p) != package.parent)]
