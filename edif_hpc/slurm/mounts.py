"""What kind of file system a folder lies on, as the kernel's table of mounts tells it.

It decides two things about a site: a folder that login and compute nodes are to share must not lie on one node's disk, and
scratch should. Names that are not known here count as local.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

SHARED: Final = frozenset(
    "9p afs beegfs ceph cifs fuse.ceph fuse.glusterfs fuse.sshfs glusterfs gpfs lustre mmfs nfs nfs4 panfs pvfs2 smb3 wekafs".split()  # noqa: SIM905
)
IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})
_TABLE = Path("/proc/self/mountinfo")


def kind_of(path: Path, table: str | None = None) -> str:
    """The type of the file system below a path, which need not exist yet; `table` is that of another time."""
    text = _TABLE.read_text() if table is None else table
    real = path.resolve()
    above = {str(each) for each in (real, *real.parents)}
    # Of mounts on one folder the last covers the others.
    found = [(len(point), number, kind) for number, (point, kind) in enumerate(_mounts(text)) if point in above]  # fmt: skip
    return max(found, default=(0, 0, "unknown"))[2]


def _mounts(text: str) -> Iterator[tuple[str, str]]:
    """Each mount's folder and type."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) > 4 and rest:
            yield fields[4].replace("\\040", " "), rest[0]
