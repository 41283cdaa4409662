"""What a cluster tells of itself: its partitions, its kinds of GPU, and what we may use there.

Four questions, each one program: `sinfo` (nodes, grouped by what they have), `scontrol show partition` (limits and who may),
`scontrol show config` (its name, whether accounts count, where nodes have room), and `sacctmgr` (our accounts and QOS),
which many clusters do not have. Their plain text is read, since it is the same in every release that is in use; JSON is
not. What a cluster does not say stays None: a file for a site is a proposal, and `sbatch --test-only` is what proves it.

The readers are pure. What they are given was printed by Slurm, and new releases add fields: those are passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from edif_hpc.errors import SlurmUnavailable
from edif_hpc.slurm.commands import Run, Runner
from edif_hpc.slurm.order import Vendor
from edif_hpc.slurm.status import ASK_TIMEOUT_S, read_duration

NODES: Final = "%R|%a|%l|%D|%c|%m|%G|%f"
_NODE_FIELDS = 8
_PAIR = re.compile(r"(?:^|\s)([A-Za-z]\w*(?:\[\d+\])?)=(\S*)")
_SETTING = re.compile(r"^(\S+)\s+= (.*)$", re.MULTILINE)
_SOCKETS = re.compile(r"\([^)]*\)")
_NUMBER = re.compile(r"\d+")
_VENDORS: tuple[tuple[Vendor, re.Pattern[str]], ...] = (
    ("amd", re.compile(r"\b(amd|instinct|radeon|gfx\w+|mi\d{2,3}[ax]?)\b")),
    (
        "nvidia",
        re.compile(
            r"\b(nvidia|tesla|geforce|quadro|titan|[rg]tx\w*|a\d{2,4}|[hb]\d{3}|h20|v100s?|l40?s?|p\d{2,3}|t4|k80|g[bh]200)\b"
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Partition:
    """A partition. `max_walltime_min` None has no limit; `accounts` and `qos` None let in all."""

    name: str
    up: bool = True
    default: bool = False
    max_walltime_min: int | None = None
    accounts: tuple[str, ...] | None = None
    qos: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GpuKind:
    """Nodes of one partition that have the same kind of GPU; numbers are those of the smallest."""

    partition: str
    gres: str  #: what one of them is called: gpu:a6000, or gpu where they have no type
    nodes: int
    per_node: int
    cpus: int
    mem_gb: int
    vendor: Vendor | None = None  #: as far as names tell it

    @property
    def type(self) -> str:
        """The type alone; "gpu" where there is none."""
        return self.gres.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class Account:
    """What we may charge, and the QOS that it gives us."""

    name: str
    partition: str | None = None  #: it counts in this one alone
    qos: tuple[str, ...] = ()
    default: bool = False


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a cluster told."""

    name: str = ""
    version: str = ""
    partitions: Mapping[str, Partition] = field(default_factory=dict)
    gpus: tuple[GpuKind, ...] = ()
    accounts: tuple[Account, ...] = ()
    node_tmp: str | None = None  #: where Slurm says that nodes have room
    kill_wait_s: int | None = None  #: from SIGTERM to SIGKILL

    def kinds(self, partition: str) -> list[GpuKind]:
        """The kinds of GPU in a partition."""
        return [each for each in self.gpus if each.partition == partition]


def detect(run: Run | None = None, *, timeout_s: float = ASK_TIMEOUT_S) -> Cluster:
    """Ask the Slurm of this machine.

    Raises:
        SlurmUnavailable: there is none, or it does not answer.
    """
    run = run or Runner()

    def ask(*argv: str) -> str:
        try:
            answer = run(argv, timeout_s=timeout_s)
        except OSError as error:
            raise SlurmUnavailable(f"{argv[0]} cannot be run here: {error}") from error
        if answer.code != 0:
            said = answer.err or answer.out.strip() or "it said nothing"
            raise SlurmUnavailable(f"{argv[0]} ended with {answer.code}: {said}")
        return answer.out

    def ask_if_there(*argv: str) -> str:
        try:
            return ask(*argv)
        except SlurmUnavailable:  # no accounting, or none for users
            return ""

    nodes = ask("sinfo", "--noheader", "--exact", "-o", NODES)
    config = read_config(ask("scontrol", "show", "config"))
    partitions = read_partitions(ask("scontrol", "show", "partition", "-o"))
    user = ask("id", "-un").strip()
    show = ("sacctmgr", "--noheader", "--parsable2", "show")
    default = ask_if_there(*show, "user", user, "format=DefaultAccount").strip()
    told = ask_if_there(*show, "assoc", f"user={user}", "format=Account,Partition,QOS")
    return Cluster(
        name=config.get("ClusterName", ""),
        version=config.get("SLURM_VERSION", ""),
        partitions=partitions,
        gpus=tuple(read_gpus(nodes)),
        accounts=tuple(read_accounts(told, default=default.partition("\n")[0])),
        node_tmp=config.get("TmpFS"),
        kill_wait_s=_number(config.get("KillWait", "")) or None,
    )


def read_config(text: str) -> dict[str, str]:
    """The settings that `scontrol show config` prints; those that are not set are left out."""
    found = {name: value.strip() for name, value in _SETTING.findall(text)}
    return {name: value for name, value in found.items() if value not in ("", "(null)")}


def read_partitions(text: str) -> dict[str, Partition]:
    """The partitions of `scontrol show partition -o`, one a line."""
    found = {}
    for line in text.splitlines():
        pairs = dict(_PAIR.findall(line))
        name = pairs.get("PartitionName", "")
        if name:
            found[name] = Partition(
                name=name,
                up=pairs.get("State", "UP") == "UP",
                default=pairs.get("Default") == "YES",
                max_walltime_min=read_minutes(pairs.get("MaxTime", "")),
                accounts=_those(pairs.get("AllowAccounts", "ALL")),
                qos=_those(pairs.get("AllowQos", "ALL")),
            )
    return found


def read_gpus(text: str) -> Iterator[GpuKind]:
    """The kinds of GPU in what sinfo printed in `NODES`: for each partition and type one, by partition."""
    kinds: dict[tuple[str, str], GpuKind] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", _NODE_FIELDS - 1)
        if len(fields) < _NODE_FIELDS:
            continue
        partition, _, _, nodes, cpus, memory, gres, features = fields
        for name, count in read_gres(gres):
            new = GpuKind(
                partition=partition,
                gres=name,
                nodes=_number(nodes),
                per_node=count,
                cpus=_number(cpus),
                mem_gb=_number(memory) // 1024,
                vendor=vendor_of(f"{name} {features}"),
            )
            known = kinds.get((partition, name))
            kinds[partition, name] = new if known is None else _merged(known, new)
    yield from kinds.values()


def read_gres(text: str) -> Iterator[tuple[str, int]]:
    """Name and number of each GPU gres in a list such as `gpu:a100:4(S:0-1),shard:8`."""
    for item in _SOCKETS.sub("", text).split(","):
        name, _, count = item.strip().rpartition(":")
        if name and count.isdecimal() and int(count) > 0 and name.split(":")[0] == "gpu":
            yield name, int(count)


def read_accounts(text: str, *, default: str) -> Iterator[Account]:
    """Our accounts in what sacctmgr printed, the default one first."""
    found = []
    for line in text.splitlines():
        name, partition, qos = [*line.strip().split("|"), "", "", ""][:3]
        if name:
            found.append(
                Account(
                    name=name,
                    partition=partition or None,
                    qos=tuple(each for each in qos.split(",") if each),
                    default=name == default,
                )
            )
    yield from sorted(found, key=lambda each: not each.default)


def read_minutes(text: str) -> int | None:
    """Minutes of a limit such as `1-00:00:00`, rounded down; None for UNLIMITED and the like."""
    days, dash, clock = text.strip().rpartition("-")
    # With days Slurm may leave off minutes and seconds: `1-12` are 36 hours.
    padded = clock + ":00" * (2 - clock.count(":")) if dash and clock else clock
    seconds = read_duration(f"{days}{dash}{padded}")
    return None if seconds is None else int(seconds // 60)


def vendor_of(names: str) -> Vendor | None:
    """Whose GPUs these names mean; None if they do not tell."""
    plain = re.sub(r"[_:,/.-]", " ", names.lower())
    return next((vendor for vendor, pattern in _VENDORS if pattern.search(plain)), None)


def _merged(one: GpuKind, other: GpuKind) -> GpuKind:
    return GpuKind(
        partition=one.partition,
        gres=one.gres,
        nodes=one.nodes + other.nodes,
        per_node=min(one.per_node, other.per_node),
        cpus=min(one.cpus, other.cpus),
        mem_gb=min(one.mem_gb, other.mem_gb),
        vendor=one.vendor or other.vendor,
    )


def _those(text: str) -> tuple[str, ...] | None:
    names: Iterable[str] = (each for each in text.split(",") if each)
    return None if text in ("ALL", "", "(null)") else tuple(names)


def _number(text: str) -> int:
    """The number at the start of `8+`, `64000` or `2K`."""
    match = _NUMBER.match(text.strip())
    number = int(match[0]) if match else 0
    return number * 1000 if text.strip().endswith("K") else number
