"""The folder of an allocation on its node: it goes with its pilot, or with the next one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.errors import LaunchError
from edif_hpc.pilot.scratch import own_folder

HOLDER = """
import sys
from pathlib import Path
from edif_hpc.pilot.scratch import own_folder
with own_folder(Path(sys.argv[1]), keep=False) as folder:
    (folder / "result").write_text("x")
    print("holds", flush=True)
    sys.stdin.read()
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another pilot, which works in `folder`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def test_it_is_private_and_goes(tmp_path: Path) -> None:
    with own_folder(tmp_path / "a" / "b", keep=False) as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "big").write_text("x")
    assert not folder.exists()


def test_it_may_be_kept(tmp_path: Path) -> None:
    with own_folder(tmp_path / "a", keep=True) as folder:
        (folder / "exit.json").write_text("{}")
    assert (folder / "exit.json").exists()


def test_only_what_dead_pilots_left_is_swept(tmp_path: Path) -> None:
    living, dead = holder(tmp_path / "living"), holder(tmp_path / "dead")
    dead.kill()
    dead.communicate()
    (tmp_path / "images").mkdir()
    assert (tmp_path / "dead" / "result").exists()
    with own_folder(tmp_path / "mine", keep=False):
        left = sorted(each.name for each in tmp_path.iterdir())
    assert left == ["images", "living", "mine"]
    with (
        pytest.raises(LaunchError, match="another pilot works in"),
        own_folder(tmp_path / "living", keep=False),
    ):
        pass
    living.communicate("")
    assert not (tmp_path / "living").exists()


def test_a_pilot_that_is_just_beginning_is_left_alone(tmp_path: Path) -> None:
    """It has made its lock and not yet taken it."""
    (tmp_path / "begins").mkdir()
    (tmp_path / "begins" / "pilot.lock").touch()
    with own_folder(tmp_path / "mine", keep=False):
        assert (tmp_path / "begins" / "pilot.lock").exists()


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    with (
        pytest.raises(LaunchError, match="others may write"),
        own_folder(tmp_path / "open", keep=False),
    ):
        pass


def test_the_folder_above_is_ours_alone(tmp_path: Path) -> None:
    """Whoever may exchange what lies in it tells us what to remove."""
    precious = tmp_path / "home"
    (precious / "thesis").mkdir(parents=True)
    (precious / "thesis" / "pilot.lock").touch()
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "link").symlink_to(precious)
    (shared / "open").mkdir()
    (shared / "open").chmod(0o777)
    for above in (shared / "link", shared / "open"):
        with (
            pytest.raises(LaunchError, match="correct `scratch` of the site"),
            own_folder(above / "mine", keep=False),
        ):
            pass
    assert (precious / "thesis").exists()
    assert not (precious / "mine").exists()


def test_the_folder_above_is_made_private(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with own_folder(tmp_path / "above" / "mine", keep=False):
            assert (tmp_path / "above").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


def test_no_scratch_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LaunchError, match="correct `scratch` of the site"),
        own_folder(tmp_path / "file" / "x", keep=False),
    ):
        pass
