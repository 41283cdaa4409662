"""Bringing an image to a node: once, whole, and the one that was meant."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edif_hpc.errors import LaunchError
from edif_hpc.pilot.staging import staged


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "worker.sif"
    path.write_bytes(b"an image" * 1000)
    return path


@pytest.fixture
def copies(tmp_path: Path) -> Path:
    return tmp_path / "copies"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_it_is_copied_once(image: Path, copies: Path) -> None:
    wanted = digest(image)
    copy = staged(image, sha256=wanted, copies=copies)
    assert copy.read_bytes() == image.read_bytes()
    inode = copy.stat().st_ino
    image.unlink()
    assert staged(image, sha256=wanted, copies=copies) == copy, "the copy is enough"
    assert copy.stat().st_ino == inode


def test_many_at_a_time_copy_once(image: Path, copies: Path) -> None:
    """Each in a process of its own, as pilots are."""
    wanted = digest(image)
    program = (
        "import sys; from pathlib import Path; from edif_hpc.pilot.staging import staged;"
        "print(staged(Path(sys.argv[1]), sha256=sys.argv[2], copies=Path(sys.argv[3])).stat().st_ino)"
    )
    command = [sys.executable, "-c", program, str(image), wanted, str(copies)]

    def one(_: int) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(one, range(4)))) == 1
    assert [each.name for each in copies.glob("*.sif")] == [f"{wanted}.sif"]
    assert not (copies / "copying").exists()


def test_another_digest(image: Path, copies: Path) -> None:
    with pytest.raises(LaunchError, match=r"wrong image: worker\.sif has sha256 .*demands aaaa"):
        staged(image, sha256="a" * 64, copies=copies)
    assert list(copies.glob("*.sif")) == []
    assert not (copies / "copying").exists()


def test_a_copy_that_was_changed_is_found_out_and_copied_anew(image: Path, copies: Path) -> None:
    wanted = digest(image)
    copy = staged(image, sha256=wanted, copies=copies)
    facts = copy.stat()
    copy.write_bytes(b"an imagE" * 1000)
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # as if nothing had happened
    with pytest.raises(LaunchError, match="wrong image"):
        staged(image, sha256=wanted, copies=copies)
    assert digest(staged(image, sha256=wanted, copies=copies)) == wanted


def test_the_digest_is_not_taken_again_without_need(image: Path, copies: Path) -> None:
    wanted = digest(image)
    copy = staged(image, sha256=wanted, copies=copies)
    verdict = copy.with_suffix(".verdict")
    verdict.write_text(verdict.read_text().replace(f'"{wanted}"', f'"{"b" * 64}"'))
    with pytest.raises(LaunchError, match="has sha256 bbbb"):  # it is believed, not the file
        staged(image, sha256=wanted, copies=copies)


def test_without_a_digest_a_new_image_is_a_new_copy(image: Path, copies: Path) -> None:
    first = staged(image, sha256=None, copies=copies)
    assert staged(image, sha256=None, copies=copies) == first
    image.write_bytes(b"another" * 1000)
    second = staged(image, sha256=None, copies=copies)
    assert second != first
    assert second.read_bytes() == image.read_bytes()


def test_no_image(tmp_path: Path, copies: Path) -> None:
    with pytest.raises(LaunchError, match=r"gone\.sif cannot be read on this node: No such file"):
        staged(tmp_path / "gone.sif", sha256="a" * 64, copies=copies)
    with pytest.raises(LaunchError, match="cannot be read"):
        staged(tmp_path / "gone.sif", sha256=None, copies=copies)


def test_no_room(image: Path, tmp_path: Path, copies: Path) -> None:
    kept = staged(image, sha256=None, copies=copies)
    huge = tmp_path / "huge.sif"
    with huge.open("wb") as file:
        file.truncate(1 << 43)
    with pytest.raises(LaunchError, match=r"no room for the image in .*MiB are free"):
        staged(huge, sha256="a" * 64, copies=copies)
    assert kept.exists(), "its room would not have been enough"


def test_other_copies_make_room(tmp_path: Path) -> None:
    """On a file system for one image and a half."""
    small = tmp_path / "small"
    small.mkdir()
    program = """
import sys
from pathlib import Path
from edif_hpc.pilot.staging import staged
folder = Path(sys.argv[1])
for name in ("first", "second"):
    image = folder / f"{name}.sif"
    image.write_bytes(name.encode() * (1 << 18))
    copy = staged(image, sha256=None, copies=folder / "small" / "copies")
    assert copy.read_bytes() == image.read_bytes()
print(len(list(copy.parent.glob("*.sif"))), (copy.parent / "copying").exists())
"""
    mounting = f"mount -t tmpfs -o size=2560k none '{small}' && exec \"$@\""
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounting, "sh"]
    done = subprocess.run(
        [*alone, sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "1 False\n", done.stderr


def test_a_folder_that_others_may_write(image: Path, copies: Path) -> None:
    copies.mkdir()
    copies.chmod(0o777)
    with pytest.raises(LaunchError, match="others may write"):
        staged(image, sha256=None, copies=copies)


def test_a_place_that_is_none(image: Path, tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="cannot be copied to"):
        staged(image, sha256=None, copies=image / "below")
