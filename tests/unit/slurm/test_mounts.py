"""On what kind of file system a folder lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.slurm.mounts import kind_of

TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /home rw shared:2 - nfs4 filer:/home rw
31 22 0:41 / /scratch rw - xfs /dev/nvme0n1 rw
32 31 0:42 / /scratch rw - lustre mds@tcp:/fs rw
33 22 0:43 / /with\\040space rw - beegfs x rw
34 22 0:44 / /dev/shm rw,nosuid - tmpfs tmpfs rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/homestead", "ext4"),
        ("/home/ada/not/yet/there", "nfs4"),
        ("/scratch/x", "lustre"),  # the later mount covers the earlier one
        ("/with space/x", "beegfs"),
        ("/dev/shm/x", "tmpfs"),
    ],
)
def test_the_nearest_mount_counts(path: str, kind: str) -> None:
    assert kind_of(Path(path), TABLE) == kind


def test_a_machine_that_tells_nothing() -> None:
    assert kind_of(Path("/"), "") == "unknown"


def test_this_machine() -> None:
    assert kind_of(Path("/proc/self")) == "proc"
