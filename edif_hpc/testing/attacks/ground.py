"""The place where attacks happen, seen from outside: what there is to take, and what an attempt left.

The targets belong to the account that the worker runs as, because that is whom the walls protect from: one's own requests.
Whatever differs after a case from what was there before it got through, whatever the attempt itself believes.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import edif_hpc
from edif_hpc.worker.engine import environment

SECRET: Final = b"of another request"
_MODE, _TIME = 0o600, 1_000_000_000


@dataclass(kw_only=True)
class Ground:
    """Targets below a folder; `user` owns them, if it is not ourselves."""

    root: Path
    user: str | None = None
    _sockets: list[socket.socket] = field(default_factory=list)
    _folders: set[Path] = field(default_factory=set)

    def __enter__(self) -> Self:
        self.root.mkdir(parents=True)
        self.outside.mkdir()
        for each in (self.root, self.outside):
            each.chmod(0o777)
            self._give(each)
        self._restore()
        self.marker.write_text("")
        self.marker.chmod(0o666)
        for address in (self.datagrams, f"\0{self.abstract}"):
            bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            bound.settimeout(0)
            bound.bind(address)
            self._sockets.append(bound)
        Path(self.datagrams).chmod(0o777)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in self._sockets:
            each.close()
        for folder in self._folders:
            shutil.rmtree(folder)

    @property
    def outside(self) -> Path:
        """A folder of the account that no executor may write in."""
        return self.root / "outside"

    @property
    def secret(self) -> Path:
        """A file of the account."""
        return self.outside / "secret"

    @property
    def marker(self) -> Path:
        """Where a value that explodes writes down in which process."""
        return self.root / "marker"

    @property
    def datagrams(self) -> str:
        """The path of a socket that everybody may write to."""
        return str(self.root / "d")

    @property
    def abstract(self) -> str:
        """The name of a socket that has no path."""
        return f"edif-{os.getpid()}-{self.root.name}"

    @property
    def name(self) -> str:
        """What attempts call the files that they leave."""
        return f"left-{os.getpid()}-{self.root.name}"

    def facts(self, *, worker: int, zygote: int, scratch: Path, weights: Path) -> dict[str, Any]:
        """What payloads are told: of this place, and of an engine with its processes and folders."""
        kinds = ("user", "pid", "mnt", "net", "ipc")
        return {
            "worker": worker,
            "zygote": zygote,
            "namespaces": {
                kind: _namespace(worker if kind == "net" else zygote, kind) for kind in kinds
            },
            "scratch": str(scratch),
            "home": str(environment.home(scratch)),
            "neighbour": str(self._neighbour(scratch)),
            "weights": str(weights),
            "package": str(Path(edif_hpc.__file__).parent),
            "outside": str(self.outside),
            "secret": str(self.secret),
            "marker": str(self.marker),
            "datagrams": self.datagrams,
            "abstract": self.abstract,
            "name": self.name,
            "patience": 60,
        }

    def exploded(self) -> str:
        """The processes in which a value exploded, since the last look."""
        told = self.marker.read_text()
        self.marker.write_text("")
        return told

    def left(self, *elsewhere: str) -> list[str]:
        """What an attempt changed here, or left in folders `elsewhere`; it is put right again."""
        found = [*self._changes(), *self._strangers(elsewhere)]
        self._restore()
        return found

    def _neighbour(self, scratch: Path) -> Path:
        """The folder of an executor: one that lasts, and is never the attacker's own, as they count from 1."""
        folder = scratch / "executor-0"
        if folder not in self._folders:
            folder.mkdir(mode=0o700)
            self._give(folder)
            self._folders.add(folder)
        return folder

    def _changes(self) -> Iterator[str]:
        facts = self.secret.lstat()
        if self.secret.read_bytes() != SECRET:
            yield "the secret has other bytes"
        if facts.st_mode & 0o777 != _MODE:
            yield f"the secret has the mode {facts.st_mode:o}"
        if facts.st_mtime != _TIME:
            yield "the secret has another time"
        for bound in self._sockets:
            with suppress(BlockingIOError):
                yield f"a datagram arrived: {bound.recv(64)!r}"

    def _strangers(self, elsewhere: tuple[str, ...]) -> Iterator[str]:
        known = {self.secret}
        for path in self.outside.iterdir():
            if path not in known:
                path.unlink()
                yield f"{path.name} was made"
        for folder in elsewhere:
            path = Path(folder) / self.name
            if path.exists():
                path.unlink()
                yield f"{path} was made"

    def _restore(self) -> None:
        self.secret.write_bytes(SECRET)
        self.secret.chmod(_MODE)
        self._give(self.secret)
        os.utime(self.secret, (_TIME, _TIME))

    def _give(self, path: Path) -> None:
        if self.user is not None:
            facts = pwd.getpwnam(self.user)
            os.chown(path, facts.pw_uid, facts.pw_gid)


def _namespace(pid: int, kind: str) -> int:
    """The zygote has given up the network for all that it forks; the rest is each executor's own."""
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino
