"""Reading what clusters tell of themselves: the text of several releases, and of clusters that leave things out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from edif_hpc.errors import SlurmUnavailable
from edif_hpc.slurm.commands import Answer
from edif_hpc.slurm.detect import (
    Account,
    GpuKind,
    detect,
    read_accounts,
    read_config,
    read_gpus,
    read_gres,
    read_minutes,
    read_partitions,
    vendor_of,
)

#: As 22.05.8 prints them.
CONFIG_22_05 = """\
Configuration data as of 2026-11-21T16:32:25
AccountingStorageEnforce = none
AccountingStorageType   = accounting_storage/none
ClusterName             = edif
EnforcePartLimits       = NO
Epilog                  = (null)
PowerPlugin             = 
SLURM_VERSION           = 22.05.8
TmpFS                   = /tmp

Cgroup Support Configuration:
ConstrainDevices        = yes

Slurmctld(primary) at vm is UP
"""  # noqa: W291 - Slurm's own line
PARTITIONS_22_05 = """\
PartitionName=a6000 AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A DefaultTime=00:01:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=00:05:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=a6000-0,a6000-1 PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=16 TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) DefMemPerCPU=500 MaxMemPerNode=UNLIMITED TRES=cpu=16,mem=125G,node=2,billing=16
PartitionName=mi300x AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=mi300x-0 State=DOWN TotalCPUs=8 TotalNodes=1
"""
#: In the form of 24.05, whose partitions name more things: accounts that may, resume and suspend times, TRES of GPUs.
PARTITIONS_24_05 = """\
PartitionName=gpu AllowGroups=ALL AllowAccounts=physics,bio AllowQos=normal,long AllocNodes=ALL Default=NO QoS=gpuq DefaultTime=01:00:00 DisableRootJobs=YES ExclusiveUser=NO ExclusiveTopo=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED MaxCPUsPerSocket=UNLIMITED NodeSets=gpus Nodes=g[01-04] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=REQUEUE State=UP TotalCPUs=256 TotalNodes=4 SelectTypeParameters=NONE JobDefaults=DefCpuPerGPU=8 ResumeTimeout=GLOBAL SuspendTimeout=GLOBAL SuspendTime=GLOBAL PowerDownOnIdle=NO DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=256,mem=2000G,node=4,billing=256,gres/gpu=16,gres/gpu:a100=16
"""
NODES = """\
gpu|up|2-00:00:00|3|64|515000|gpu:a100:4(S:0-1),shard:a100:16|a100,ib
gpu|up|2-00:00:00|1|48|257000|gpu:a100:2(S:0)|a100
gpu|up|2-00:00:00|1|64|515000|gpu:a100_3g.20gb:8|mig
cpu|up|infinite|100|128|256000|(null)|(null)
old|up|1:00:00|2|16|64000|gpu:2|k80
amd|up|1-00:00:00|2|192|2300000|gpu:mi300x:8(IDX:0-7)|gfx942
"""


def test_settings_that_are_set() -> None:
    config = read_config(CONFIG_22_05)
    assert (config["ClusterName"], config["SLURM_VERSION"], config["TmpFS"]) == ("edif", "22.05.8", "/tmp")  # fmt: skip
    assert {"Epilog", "PowerPlugin"}.isdisjoint(config)


def test_partitions_of_22_05() -> None:
    found = read_partitions(PARTITIONS_22_05)
    assert (found["a6000"].up, found["a6000"].default, found["a6000"].max_walltime_min) == (True, False, 5)  # fmt: skip
    assert found["a6000"].accounts is None
    assert (found["mi300x"].up, found["mi300x"].default) == (False, True)
    assert found["mi300x"].max_walltime_min is None


def test_partitions_of_24_05() -> None:
    gpu = read_partitions(PARTITIONS_24_05)["gpu"]
    assert gpu.accounts == ("physics", "bio")
    assert gpu.qos == ("normal", "long")
    assert gpu.max_walltime_min == 2 * 24 * 60


def test_gpus_are_those_of_the_smallest_node_of_a_kind() -> None:
    found = {(each.partition, each.gres): each for each in read_gpus(NODES)}
    assert found["gpu", "gpu:a100"] == GpuKind(
        partition="gpu", gres="gpu:a100", nodes=4, per_node=2, cpus=48, mem_gb=250, vendor="nvidia"
    )
    assert found["gpu", "gpu:a100_3g.20gb"].per_node == 8
    assert (found["old", "gpu"].type, found["old", "gpu"].vendor) == ("gpu", "nvidia")
    assert (found["amd", "gpu:mi300x"].type, found["amd", "gpu:mi300x"].vendor) == ("mi300x", "amd")  # fmt: skip
    assert len(found) == 4


def test_a_node_without_gpus_has_none() -> None:
    assert list(read_gres("(null)")) == []
    assert list(read_gres("craynetwork:4,gpu:0")) == []


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("1-00:00:00", 1440), ("2-12", 3600), ("1-06:30", 1830), ("00:05:00", 5), ("5:00", 5), ("UNLIMITED", None), ("infinite", None), ("", None)],
)  # fmt: skip
def test_limits(text: str, minutes: int | None) -> None:
    assert read_minutes(text) == minutes


@pytest.mark.parametrize(
    ("names", "vendor"),
    [
        ("gpu:nvidia_a100_80gb_pcie", "nvidia"), ("gpu:a6000", "nvidia"), ("gpu:h100", "nvidia"), ("gpu:rtx6000", "nvidia"),
        ("gpu:l40s", "nvidia"), ("gpu:gh200", "nvidia"), ("gpu:mi300x", "amd"), ("gpu:mi250", "amd"), ("gpu gfx90a", "amd"),
        ("gpu:amd_instinct_mi300x", "amd"), ("gpu:big", None), ("gpu (null)", None),
    ],
)  # fmt: skip
def test_names_tell_the_vendor(names: str, vendor: str | None) -> None:
    assert vendor_of(names) == vendor


def test_accounts() -> None:
    found = list(read_accounts("bio||normal\nphysics|gpu|normal,long\n", default="physics"))
    assert found == [
        Account(name="physics", partition="gpu", qos=("normal", "long"), default=True),
        Account(name="bio", qos=("normal",)),
    ]


def programs(**said: str | int) -> object:
    """Slurm's programs, by name: what they say, or their exit code."""

    def run(argv: Sequence[str], *, timeout_s: float, stdin: str = "") -> Answer:
        name = "_".join(each for each in argv[:3] if each[0] != "-" and each[0] != "%")
        said_now = said.get(name, 1)
        if isinstance(said_now, int):
            return Answer(code=said_now, out="", err=f"{name} is not here")
        return Answer(code=0, out=said_now, err="")

    return run


ALL = {
    "sinfo": NODES, "id": "ada\n", "scontrol_show_config": CONFIG_22_05, "scontrol_show_partition": PARTITIONS_24_05,
}  # fmt: skip


def test_a_cluster_without_accounting() -> None:
    cluster = detect(programs(**ALL))  # type: ignore[arg-type]
    assert (cluster.name, cluster.version, cluster.node_tmp) == ("edif", "22.05.8", "/tmp")
    assert cluster.accounts == ()
    assert [each.gres for each in cluster.kinds("gpu")] == ["gpu:a100", "gpu:a100_3g.20gb"]


def test_a_cluster_that_does_not_answer() -> None:
    silent = programs(**(ALL | {"scontrol_show_config": 1}))
    with pytest.raises(SlurmUnavailable, match="scontrol ended with 1: scontrol_show_config is"):
        detect(silent)  # type: ignore[arg-type]


def test_a_machine_without_slurm() -> None:
    def run(argv: Sequence[str], *, timeout_s: float, stdin: str = "") -> Answer:
        raise FileNotFoundError(2, "No such file or directory", argv[0])

    with pytest.raises(SlurmUnavailable, match="sinfo cannot be run here"):
        detect(run)
