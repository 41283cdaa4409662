"""Models that an operator published: kept whole in the data directory, replaced in one step.

    hub/<org>/<name>/main              which of the folders below is shown
    hub/<org>/<name>/<id>/             one publication: its files, and `.repository.json`
    hub/.uploads/<id>/                 what is still arriving; emptied at start

A publication is complete and synced before `main` names it, so a reader sees the old model or the new one, and a crash
leaves the old. The publication before it stays until the next one, or until a restart: a client that is downloading its
commit file by file can finish.

No path is ever made from what a request names: a request's file is looked up among the names that `Manifest.check` let in.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from msgspec import Struct

from edif_hpc.errors import InvalidInput, NotFound, StoreUnavailable, TooLarge
from edif_hpc.objects.directory import disk_error, sync_folder
from edif_hpc.objects.repository import File, Kind, Manifest, check_repo_id, digest_of, kind_of

_MAX_UPLOADS = 16
_DESCRIPTION = ".repository.json"
_HANDLE = re.compile(r"[0-9a-f]{32}")


class Description(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A publication as its operator describes it; what it is kept as, too."""

    repo_id: str
    task: str
    files: dict[str, File]
    parameters: dict[str, int] = {}
    weights: bool = False
    code: bool = False

    def check(self) -> None:
        """Raise `InvalidInput` for what cannot be published."""
        check_repo_id(self.repo_id)
        self.manifest.check()

    @property
    def manifest(self) -> Manifest:
        """Its files."""
        return Manifest(files=self.files, parameters=self.parameters)


@dataclass(frozen=True, kw_only=True)
class Repo:
    """One commit of one model, as the hub shows it."""

    name: str
    root: Path
    manifest: Manifest
    task: str
    revision: str = "main"  #: the branch that it is the head of
    weights: bool = False  #: whether weights are handed out
    code: bool = False  #: whether code is handed out

    @property
    def served(self) -> dict[str, File]:
        """The files that are handed out."""
        kinds = {Kind.CONFIG}
        kinds |= {Kind.WEIGHTS} if self.weights else set()
        kinds |= {Kind.CODE} if self.code else set()
        return {name: file for name, file in self.manifest.files.items() if kind_of(name) in kinds}

    def is_at(self, revision: str) -> bool:
        """Whether it is what this revision names."""
        return revision in (self.revision, self.manifest.commit)


@dataclass(kw_only=True)
class _Upload:
    description: Description
    repo: Repo
    arrived: set[str] = field(default_factory=set)

    @property
    def missing(self) -> list[str]:
        return sorted(set(self.repo.served) - self.arrived)


class Shelf:
    """The published models below `root`. Its methods touch the disk: call them from a thread."""

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self._root, self._max_bytes = root, max_bytes
        self._uploads: dict[str, _Upload] = {}
        self._repos: dict[str, list[Repo]] = {}  # by folded name, the shown one first
        try:
            shutil.rmtree(root / ".uploads", ignore_errors=True)
            for home in sorted(root.glob("*/*")):
                self._restore(home)
        except OSError as error:
            raise disk_error(root, error) from error

    def repos(self) -> list[Repo]:
        """What is shown, by name."""
        return sorted((each[0] for each in self._repos.values()), key=lambda repo: repo.name)

    def versions(self, name: str) -> list[Repo]:
        """The shown commit of a name and the one before it."""
        return self._repos.get(name.lower(), [])

    def begin(self, description: Description) -> tuple[str, list[str]]:
        """Start a publication; returns its handle and the files that are to be sent."""
        description.check()
        handle = secrets.token_hex(16)
        repo = _repo(description, self._root / ".uploads" / handle)
        size = sum(each.size_bytes for each in repo.served.values())
        if size > self._max_bytes:
            raise TooLarge(
                f"{repo.name} has {size} bytes to publish; this relay takes {self._max_bytes} a "
                "model (hub_max_bytes). Publish it without its weights, or ask for a larger limit"
            )
        while len(self._uploads) >= _MAX_UPLOADS:
            self._discard(next(iter(self._uploads)))
        upload = self._uploads[handle] = _Upload(description=description, repo=repo)
        try:
            repo.root.mkdir(parents=True, mode=0o700)
            self._reuse(upload)
        except OSError as error:
            raise disk_error(self._root, error) from error
        return handle, upload.missing

    def place(self, handle: str, name: str) -> tuple[Path, int]:
        """Where to write a file that is arriving, and how large it is."""
        upload = self._upload(handle)
        file = upload.repo.served.get(name)
        if file is None:
            raise NotFound(f"{upload.repo.name} was announced without a file {name[:200]!r}")
        return upload.repo.root / f".{secrets.token_hex(8)}.part", file.size_bytes

    def arrived(self, handle: str, name: str, part: Path) -> None:
        """A file is written whole: check it and keep it."""
        upload = self._upload(handle)
        told, found = upload.repo.served[name], part.stat().st_size
        digest = digest_of(part, safetensors=name.endswith(".safetensors"))
        if (found, digest) != (told.size_bytes, told.digest):
            raise InvalidInput(
                f"{name} arrived with {found} of {told.size_bytes} bytes, or changed on the way; "
                "publish again"
            )
        target = upload.repo.root / name
        target.parent.mkdir(exist_ok=True, mode=0o700)
        part.rename(target)
        upload.arrived.add(name)

    def finish(self, handle: str) -> Repo:
        """Show what has arrived in place of what was there."""
        upload = self._upload(handle)
        if upload.missing:
            raise InvalidInput(f"files are missing: {', '.join(upload.missing)}; send them first")
        home = self._home(upload.repo.name)
        try:
            _write(upload.repo.root / _DESCRIPTION, msgspec.json.encode(upload.description))
            home.mkdir(parents=True, exist_ok=True, mode=0o700)
            upload.repo.root.rename(home / handle)
            _write(home / "main", handle.encode())
        except OSError as error:
            raise disk_error(self._root, error) from error
        del self._uploads[handle]
        repo = _repo(upload.description, home / handle)
        versions = [repo, *self.versions(repo.name)]
        self._repos[repo.name.lower()] = versions[:2]
        for old in versions[2:]:
            shutil.rmtree(old.root, ignore_errors=True)
        return repo

    def remove(self, name: str) -> None:
        """Show a name no more."""
        if not self._repos.pop(name.lower(), None):
            published = ", ".join(each.name for each in self.repos()) or "nothing"
            raise NotFound(f"{name[:200]!r} is not published; published: {published}")
        try:
            (self._home(name) / "main").unlink()
            shutil.rmtree(self._home(name))
        except OSError as error:
            raise disk_error(self._root, error) from error

    def _restore(self, home: Path) -> None:
        pointer = home / "main"
        shown = pointer.read_text() if pointer.exists() else None
        for other in home.iterdir():
            if other.is_dir() and other.name != shown:
                shutil.rmtree(other, ignore_errors=True)
        if shown is None:
            return
        try:
            content = (home / shown / _DESCRIPTION).read_bytes()
            repo = _repo(msgspec.json.decode(content, type=Description), home / shown)
        except (OSError, msgspec.DecodeError) as error:
            raise StoreUnavailable(
                f"the published model in {home} is damaged ({error}); remove that folder, start "
                "again, and publish it again"
            ) from error
        self._repos[repo.name.lower()] = [repo]

    def _reuse(self, upload: _Upload) -> None:
        """Link the files that are published already; weights need not travel twice."""
        for shown in self.versions(upload.repo.name)[:1]:
            for name, file in upload.repo.served.items():
                if shown.served.get(name) == file:
                    target = upload.repo.root / name
                    target.parent.mkdir(exist_ok=True, mode=0o700)
                    os.link(shown.root / name, target)
                    upload.arrived.add(name)

    def _upload(self, handle: str) -> _Upload:
        if not _HANDLE.fullmatch(handle) or handle not in self._uploads:
            raise NotFound(f"there is no upload {handle[:40]!r} (any more); publish again")
        return self._uploads[handle]

    def _discard(self, handle: str) -> None:
        shutil.rmtree(self._uploads.pop(handle).repo.root, ignore_errors=True)

    def _home(self, name: str) -> Path:
        # Names that differ only in case are one, on any file system.
        return self._root / check_repo_id(name).lower()


def _repo(description: Description, root: Path) -> Repo:
    return Repo(
        name=description.repo_id,
        root=root,
        manifest=description.manifest,
        task=description.task,
        weights=description.weights,
        code=description.code,
    )


def _write(path: Path, content: bytes) -> None:
    """Durable and in one step."""
    temporary = path.with_name(f".{secrets.token_hex(8)}.part")
    with temporary.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_folder(path.parent)
