"""A real Slurm for tests: a controller and three nodes of Debian's own packages, on one machine.

Two partitions: `a6000` with two nodes and `mi300x` with one, of two (pretended) GPUs each or more, which Slurm hands out as it would
real ones: by type, through an environment variable, and with a cgroup around each allocation where the machine has them.
Every limit is five minutes. All daemons listen on the loopback at free ports, know each other by a key of their own, and
die with whoever started them, so that any number of clusters can run side by side. Jobs run as an ordinary user.

It is Slurm that is tested against, so its slowness is real too: it looks at time limits every half minute.

    with serve_slurm(Path("/var/tmp/slurm")) as cluster:
        Slurm(cluster.site(), run=cluster.run).list_jobs()

Needs root, to be several users at once.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from edif_hpc.errors import LaunchError
from edif_hpc.slurm.commands import Runner, clean
from edif_hpc.slurm.order import Vendor
from edif_hpc.slurm.site import Gpu, Site
from edif_hpc.testing.debian import PartMissing, install_packages, run
from edif_hpc.testing.processes import processes_of
from edif_hpc.testing.stack import free_port
from edif_hpc.testing.wait import wait_until

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "munged")
USER = "nobody"
MAX_MIN = 5
KILL_WAIT_S = 3
#: There is one, for jobs that ask for it: a limit on how many of them run.
LICENSE = "seat"
_CGROUPS = ("memory", "devices", "freezer", "cpuacct")
_START_S = 60.0
_STOP_S = 20.0

_CONF = """\
ClusterName=edif
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
{tracking}
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
PropagateResourceLimits=NONE
JobRequeue=1
KillWait={kill_wait}
CompleteWait=0
MinJobAge=5
SlurmctldTimeout=60
SlurmdTimeout=60
MessageTimeout=10
UnkillableStepTimeout=20
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1,default_queue_depth=1000,bf_continue
PriorityType=priority/basic
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
Licenses={license}:1
"""
_IN_CGROUPS = (
    "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nJobAcctGatherType=jobacct_gather/none"
)
_IN_NO_CGROUPS = "ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none"
_CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainRAMSpace=yes\nConstrainDevices=yes\n"


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of GPU: its nodes, the major number of its device files, and which variable Slurm sets for it."""

    nodes: int
    major: int
    flag: str
    vendor: Vendor


_KINDS: Mapping[str, _Kind] = {
    "a6000": _Kind(nodes=2, major=240, flag="nvidia_gpu_env", vendor="nvidia"),
    "mi300x": _Kind(nodes=1, major=241, flag="amd_gpu_env", vendor="amd"),
}


@dataclass(kw_only=True)
class SlurmCluster:
    """A running cluster."""

    root: Path
    gpus: int = 2  #: of each node
    user: str = USER
    tag: str = field(default_factory=lambda: secrets.token_hex(3))
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    # -- what a test takes -------------------------------------------------------------------------------------------------

    @property
    def conf(self) -> Path:
        """The configuration; `SLURM_CONF` of whoever uses the cluster."""
        return self.root / "slurm.conf"

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the ordinary user."""
        home = self.root / "home"
        return {
            "PATH": os.environ["PATH"], "HOME": str(home), "USER": self.user, "LOGNAME": self.user,
            "LANG": "C.UTF-8", "SLURM_CONF": str(self.conf),
        }  # fmt: skip

    @property
    def run(self) -> Runner:
        """Runs programs as the ordinary user."""
        who = (
            "setpriv",
            "--reuid",
            self.user,
            "--regid",
            str(self.ids[1]),
            "--clear-groups",
            "--",
        )
        return Runner(prefix=who if os.geteuid() == 0 else (), environ=self.environ)

    @property
    def ids(self) -> tuple[int, int]:
        """The ordinary user's uid and gid."""
        found = pwd.getpwnam(self.user)
        return found.pw_uid, found.pw_gid

    @property
    def nodes(self) -> dict[str, tuple[str, ...]]:
        """The names of the nodes of each partition; no other cluster has the same."""
        return {
            kind: tuple(f"{kind}-{number}-{self.tag}" for number in range(facts.nodes))
            for kind, facts in _KINDS.items()
        }

    def site(self) -> Site:
        """The cluster as a site file would describe it."""
        gpus = {
            kind: Gpu(partition=kind, gres=f"gpu:{kind}", vendor=facts.vendor, max_walltime_min=MAX_MIN, cpus=1, mem_gb=1)
            for kind, facts in _KINDS.items()
        }  # fmt: skip
        return Site(
            name="test-cluster",
            scheduler="slurm",
            state_dir=self.root / "home" / "state",
            kill_wait_s=KILL_WAIT_S,
            gpus=gpus,
        )

    def folder(self, name: str) -> Path:
        """A new folder for the ordinary user alone."""
        path = self.root / "home" / name
        path.mkdir(mode=0o700)
        os.chown(path, *self.ids)
        return path

    # -- what happens to clusters ------------------------------------------------------------------------------------------

    def node_down(self, node: str) -> None:
        """Lose a node, with what runs on it."""
        self.admin("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def node_up(self, node: str) -> None:
        """Have it back; one whose daemon lives comes back by itself, sooner or later."""

        def serves() -> bool:
            state = self.admin("sinfo", "-h", "-n", node, "-o", "%T")
            if "down" in state:
                with suppress(LaunchError):  # it has just come back
                    self.admin("scontrol", "update", f"nodename={node}", "state=resume")
            return any(word in state for word in ("idle", "mixed", "allocated"))

        wait_until(serves, _START_S, f"{node} serves again")

    def end_now(self, job_id: str, in_s: int = 1) -> None:
        """Let a running job's time be over soon; Slurm finds out within half a minute."""
        self.admin("scontrol", "update", f"job={job_id}", f"EndTime=now+{in_s}")

    def hold(self, job_id: str) -> None:
        """Keep a job from starting, as an administrator does."""
        self.admin("scontrol", "hold", job_id)

    def stop_controller(self) -> None:
        """Let nobody answer."""
        self._end("slurmctld", signal.SIGTERM)

    def start_controller(self) -> None:
        """Start the controller, on the state that it left."""
        self._spawn("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        wait_until(self._answers, _START_S, f"the controller answers; its log: {self.root}/log")

    def restart_controller(self) -> None:
        """Kill the controller and start it again."""
        self._end("slurmctld", signal.SIGKILL)
        self.start_controller()

    def admin(self, *command: str) -> str:
        """Run a command as the administrator; returns what it says."""
        return run(command, env=clean(self._admin_environ), timeout_s=_START_S)

    # -- life ------------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Write the configuration and start all daemons."""
        self._write_files()
        uid, gid = _munge_ids()
        for path in (self.root / "munge", self.root / "munge" / "key"):
            os.chown(path, uid, gid)
        folder = self.root / "munge"
        files = [f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed")]
        munged = ["munged", "--foreground", "--force", f"--socket={folder}/socket", *files]
        self._spawn("munge", "setpriv", "--reuid", str(uid), "--regid", str(gid), "--clear-groups", "--", *munged)  # fmt: skip
        wait_until((folder / "socket").exists, _START_S, "munge listens")
        self.start_controller()
        for node in self._all_nodes:
            self._spawn(f"slurmd.{node}", "slurmd", "-D", "-N", node, "-f", str(self.conf))
        wait_until(self._all_idle, _START_S, f"all nodes are idle; their logs: {self.root}/log")

    def stop(self) -> None:
        """End all jobs, then all daemons, and whatever they left behind."""
        with suppress(LaunchError, TimeoutError):  # what is left then is killed below
            self.admin("scancel", "--user", self.user)
            wait_until(lambda: not self.admin("squeue", "-h"), _STOP_S, "all jobs have ended")
        for name in reversed(list(self._daemons)):
            self._end(name, signal.SIGTERM)
        for left in processes_of(self.root):
            left.kill()
        self._remove_cgroups()

    @property
    def _admin_environ(self) -> dict[str, str]:
        return {"PATH": os.environ["PATH"], "HOME": str(self.root), "SLURM_CONF": str(self.conf)}

    @property
    def _all_nodes(self) -> list[str]:
        return [node for nodes in self.nodes.values() for node in nodes]

    def _write_files(self) -> None:
        for name in (
            "state",
            "log",
            "munge",
            "dev",
            "home",
            *(f"spool/{each}" for each in self._all_nodes),
        ):
            (self.root / name).mkdir(parents=True, mode=0o755)
        os.chown(self.root / "home", *self.ids)
        key = self.root / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = os.uname().nodename.partition(".")[0]
        in_cgroups = all(Path(f"/sys/fs/cgroup/{each}").is_mount() for each in _CGROUPS)
        conf = _CONF.format(
            host=host, port=free_port(), root=self.root, tracking=_IN_CGROUPS if in_cgroups else _IN_NO_CGROUPS,
            license=LICENSE,
            kill_wait=KILL_WAIT_S,
        )  # fmt: skip
        gres = "AutoDetect=off\n"
        for kind, facts in _KINDS.items():
            for number in range(self.gpus):
                # No driver answers here; not the number of a device that anybody needs, since access to it is taken away.
                device = os.makedev(facts.major, number)
                os.mknod(self.root / "dev" / f"{kind}-{number}", 0o020666, device)
            for node in self.nodes[kind]:
                conf += (
                    f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} "
                    f"CPUs={max(8, self.gpus)} RealMemory=64000 Gres=gpu:{kind}:{self.gpus} State=UNKNOWN\n"
                )
                gres += f"NodeName={node} Name=gpu Type={kind} File={self.root}/dev/{kind}-[0-{self.gpus - 1}] Flags={facts.flag}\n"
            conf += f"PartitionName={kind} Nodes={','.join(self.nodes[kind])} DefaultTime=1 MaxTime={MAX_MIN} DefMemPerCPU=500 State=UP\n"
        self.conf.write_text(conf)
        (self.root / "gres.conf").write_text(gres)
        (self.root / "cgroup.conf").write_text(_CGROUP_CONF)

    def _spawn(self, name: str, *command: str) -> None:
        """Start a daemon as a child that dies with us, however we die."""
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],  # noqa: S607 - found by PATH, as Slurm is
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=clean(self._admin_environ), start_new_session=True,
            )  # fmt: skip

    def _end(self, name: str, number: signal.Signals) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _answers(self) -> bool:
        try:
            return "UP" in self.admin("scontrol", "ping")
        except LaunchError:
            return False

    def _all_idle(self) -> bool:
        said = self.admin("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()
        return set(said) == set(self._all_nodes)

    def _remove_cgroups(self) -> None:
        for node in self._all_nodes:
            for top in Path("/sys/fs/cgroup").glob(f"*/slurm_{node}"):
                for folder in sorted(top.rglob("*/"), reverse=True):
                    with suppress(OSError):  # one that still holds a dying process goes with it
                        folder.rmdir()
                with suppress(OSError):
                    top.rmdir()


@contextmanager
def serve_slurm(root: Path, *, gpus: int = 2) -> Iterator[SlurmCluster]:
    """Start a cluster with its files below `root`, which everybody must be able to reach; end it afterwards.

    Each node has so many GPUs, and eight cores or as many.

    Raises:
        PartMissing: the packages are missing and cannot be installed, or this is not root.
        LaunchError: a daemon did not start.
    """
    if os.geteuid() != 0:
        raise PartMissing("a real Slurm runs jobs as another user, so it must be started by root")
    install_packages(*PACKAGES, programs=PROGRAMS)
    cluster = SlurmCluster(root=root, gpus=gpus)
    with ExitStack() as ending:
        ending.callback(shutil.rmtree, root, ignore_errors=True)
        ending.callback(cluster.stop)
        cluster.start()
        yield cluster


def _munge_ids() -> tuple[int, int]:
    found = pwd.getpwnam("munge")
    return found.pw_uid, found.pw_gid
