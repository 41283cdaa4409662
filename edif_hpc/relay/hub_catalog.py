"""Which models the hub shows: those that were published, and those that are deployed from a folder of the relay's own disk.

A published model comes first. A deployment's folder is read where it lies: its commit is taken anew whenever a file's
size or time changes, so what is shown is what is there. Its code is handed out if the deployment trusts it, its weights
if `hub_weights` lists its name.

A deployment whose folder is not on this disk has a name that only the cluster can fill. The catalog knows it as *absent*,
so that nobody looks for it elsewhere: the real Hub may have another model of that name.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from edif_hpc.domain.deployment import Deployment
from edif_hpc.errors import InvalidInput
from edif_hpc.objects.repository import (
    CONFIG_FILE,
    Manifest,
    find_files,
    is_repo_id,
    read_manifest,
)
from edif_hpc.relay.hub_shelf import Repo, Shelf

_log = logging.getLogger(__name__)

_Signature = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Patterns:
    """Names of repositories, written as patterns with `*`, apart by commas or spaces."""

    patterns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Patterns:
        """As a setting has them."""
        return cls(
            patterns=tuple(re.split(r"[,\s]+", text.strip().lower())) if text.strip() else ()
        )

    def match(self, name: str) -> bool:
        """Whether one of them matches, in any case."""
        return any(fnmatchcase(name.lower(), each) for each in self.patterns)


class Catalog:
    """All that the hub shows."""

    def __init__(
        self, *, shelf: Shelf, deployments: Callable[[], Sequence[Deployment]], weights: Patterns
    ) -> None:
        self._shelf, self._deployments, self._weights = shelf, deployments, weights
        self._seen: dict[Path, tuple[_Signature, Manifest]] = {}
        self._locks: dict[Path, asyncio.Lock] = {}

    async def versions(self, name: str) -> list[Repo]:
        """All commits of a name that are here, the one to show first at the front."""
        found = list(self._shelf.versions(name))
        mine = [each for each in self._deployments() if _has_folder(each) and _is(each, name)]
        for deployment in sorted(mine, key=lambda each: each.revision is not None):
            manifest = await self._manifest(Path(deployment.source or ""))
            if manifest is not None:
                found.append(self._repo(deployment, manifest))
        return found

    async def repos(self) -> list[Repo]:
        """The one to show of each name."""
        names = {each.name for each in self._shelf.repos()}
        names |= {each.repo_id for each in self._deployments() if _has_folder(each)}
        return [each for name in sorted(names) for each in (await self.versions(name))[:1]]

    def absent(self, name: str) -> bool:
        """Whether a name is deployed from a folder, so that it means that model and no other."""
        return any(each.source is not None and _is(each, name) for each in self._deployments())

    def deployed(self, name: str) -> bool:
        """Whether a name is deployed, from wherever, as a model or as an adapter of one."""
        deployments = self._deployments()
        adapters = {every.repo_id.lower() for each in deployments for every in each.adapters}
        return name.lower() in adapters or any(_is(each, name) for each in deployments)

    def _repo(self, deployment: Deployment, manifest: Manifest) -> Repo:
        return Repo(
            name=deployment.repo_id,
            root=Path(deployment.source or ""),
            manifest=manifest,
            task=deployment.task,
            revision=deployment.revision or "main",
            weights=self._weights.match(deployment.repo_id),
            code=deployment.trust_remote_code,
        )

    async def _manifest(self, folder: Path) -> Manifest | None:
        """The folder's manifest; None if it is not here, or no model (any more)."""
        # Whoever waits for a folder being read waits here: in a thread, they would keep others from the disk.
        async with self._locks.setdefault(folder, asyncio.Lock()):
            try:
                return await asyncio.to_thread(self._current, folder)
            except (InvalidInput, OSError) as error:
                _log.warning(
                    "a deployed folder cannot be shown: %s", error, extra={"event": "hub_folder"}
                )
                return None

    def _current(self, folder: Path) -> Manifest | None:
        if not (folder / CONFIG_FILE).is_file():
            return None
        found = [(name, path.stat()) for name, path in find_files(folder).items()]
        signature = tuple((name, each.st_size, each.st_mtime_ns) for name, each in found)
        known = self._seen.get(folder)
        if known is None or known[0] != signature:
            known = self._seen[folder] = (signature, read_manifest(folder))
        return known[1]


def _is(deployment: Deployment, name: str) -> bool:
    return deployment.repo_id.lower() == name.lower()


def _has_folder(deployment: Deployment) -> bool:
    """Whether it is deployed from a folder, under a name that the Hub's clients can ask for."""
    return (
        deployment.source is not None
        and Path(deployment.source).is_absolute()
        and is_repo_id(deployment.repo_id)
    )
