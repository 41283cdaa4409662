"""Bringing an image to the node, once, and knowing that it is the one that was meant.

Images are gigabytes of small files on a shared file system, and every import of every worker would be read from there. So
the first pilot on a node copies the image to fast storage; the others wait for its lock and find the copy. A copy appears
under its name only when it is whole. It is named by the digest that the order demands, or by the original's size and time.

The digest is taken while copying, and again before a run if the copy is not what it was when its digest was taken (its
size or its times differ). Copies that no order asks for stay until there is no room for a new one: a container that runs from
one that is removed does not notice.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import msgspec

from edif_hpc.errors import LaunchError
from edif_hpc.slurm.submit import check_folder

_CHUNK_BYTES = 4 << 20
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The digest of a file, for as long as its size and times are these."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str


def staged(image: Path, *, sha256: str | None, copies: Path) -> Path:
    """Return the node's copy of `image`, which is made if need be, and checked.

    Raises:
        LaunchError: there is no such image, it is not the one that was meant, or there is no room for it.
    """
    try:
        check_folder(copies)
        with _locked(copies / "lock"):
            return _checked(image, sha256, copies)
    except OSError as error:
        raise LaunchError(f"the image {image} cannot be copied to {copies}: {error}") from error


def _checked(image: Path, sha256: str | None, copies: Path) -> Path:
    copy = copies / f"{sha256 or _name_of(image)}.sif"
    if not copy.exists():
        _copy(image, copy, sha256)
    elif sha256 is not None and (digest := _digest(copy)) != sha256:
        copy.unlink()  # the next start copies it anew
        raise _other(copy, digest, sha256)
    return copy


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _name_of(image: Path) -> str:
    facts = _facts(image)
    place = hashlib.sha256(str(image).encode()).hexdigest()[:12]
    return f"{place}-{facts.st_size}-{facts.st_mtime_ns}"


def _facts(image: Path) -> os.stat_result:
    try:
        return image.stat()
    except OSError as error:
        raise LaunchError(
            f"the image {image} cannot be read on this node: {error.strerror}; build it with scripts/build-image, and "
            "give its path in the site's file"
        ) from error


def _copy(image: Path, copy: Path, sha256: str | None) -> None:
    """Copy under another name, check, and rename."""
    size = _facts(image).st_size
    _make_room(copy.parent, size)
    half = copy.parent / "copying"
    try:
        with image.open("rb") as source, half.open("wb") as target:
            digest = _read(source, target)
        if sha256 is not None and digest != sha256:
            raise _other(image, digest, sha256)
        half.rename(copy)
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise _no_room(copy.parent, size) from error
        raise
    finally:
        half.unlink(missing_ok=True)
    _remember(copy, digest)


def _read(source: BinaryIO, target: BinaryIO | None = None) -> str:
    found = hashlib.sha256()
    while chunk := source.read(_CHUNK_BYTES):
        found.update(chunk)
        if target is not None:
            target.write(chunk)
    return found.hexdigest()


def _digest(copy: Path) -> str:
    """The digest of a copy: the known one, if the copy is as it was."""
    try:
        known = msgspec.json.decode(_verdict_file(copy).read_bytes(), type=Verdict)
    except (OSError, msgspec.DecodeError):
        known = None
    if known is not None and known == _verdict(copy, known.sha256):
        return known.sha256
    with copy.open("rb") as file:
        digest = _read(file)
    _remember(copy, digest)
    return digest


def _verdict(copy: Path, digest: str) -> Verdict:
    facts = copy.stat()
    return Verdict(
        path=str(copy),
        size=facts.st_size,
        mtime_ns=facts.st_mtime_ns,
        ctime_ns=facts.st_ctime_ns,
        sha256=digest,
    )


def _remember(copy: Path, digest: str) -> None:
    _verdict_file(copy).write_bytes(msgspec.json.encode(_verdict(copy, digest)))


def _verdict_file(copy: Path) -> Path:
    return copy.with_suffix(".verdict")


def _make_room(folder: Path, size: int) -> None:
    """Remove other copies, the oldest first, if there is no room beside them."""
    others = sorted(folder.glob("*.sif"), key=lambda each: each.stat().st_mtime_ns)
    if shutil.disk_usage(folder).free + sum(each.stat().st_size for each in others) < size:
        raise _no_room(folder, size)
    for other in others:
        if shutil.disk_usage(folder).free >= size:
            return
        _verdict_file(other).unlink(missing_ok=True)
        other.unlink()


def _no_room(folder: Path, size: int) -> LaunchError:
    free = shutil.disk_usage(folder).free
    return LaunchError(
        f"no room for the image in {folder}: it takes {size >> 20} MiB, {free >> 20} MiB are free; give the site another "
        "scratch"
    )


def _other(image: Path, digest: str, sha256: str) -> LaunchError:
    return LaunchError(
        f"wrong image: {image.name} has sha256 {digest[:16]}…, the order demands {sha256[:16]}…; give the site the "
        f"digest of what it should run (sha256sum {image})"
    )
