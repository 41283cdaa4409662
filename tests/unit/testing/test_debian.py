"""What cannot be had is said in one way, and nothing is fetched that is here."""

from __future__ import annotations

from pathlib import Path

import pytest

from edif_hpc.errors import LaunchError
from edif_hpc.testing.debian import PartMissing, download, install_packages, run


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; it holds no apt."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_programs_on_the_path_are_enough(programs: Path) -> None:
    for name in ("slurmd", "munged"):
        (programs / name).touch(mode=0o755)
    install_packages("slurmd", "munge", programs=["slurmd", "munged"])


def test_what_is_missing_is_named_with_the_way_to_get_it(programs: Path) -> None:
    (programs / "slurmd").touch(mode=0o755)
    with pytest.raises(PartMissing, match=r"needs munged; .* apt-get install .* slurmd munge$"):
        install_packages("slurmd", "munge", programs=["slurmd", "munged"])
    with pytest.raises(PartMissing, match="needs libsqlite3-0;"):
        install_packages("libsqlite3-0")


def test_a_file_that_no_index_has_is_missing(tmp_path: Path) -> None:
    with pytest.raises(PartMissing, match=r"pip download .*edif-nothing"):
        download("--no-index", "edif-nothing==0", folder=tmp_path)


def test_a_command_that_fails_is_told_with_its_words() -> None:
    assert run(["echo", "yes"]) == "yes\n"
    with pytest.raises(LaunchError, match=r"sh -c .* ended with 3: no disk"):
        run(["sh", "-c", "echo no disk >&2; exit 3"])
    with pytest.raises(LaunchError, match=r"has not ended within 0.1 s"):
        run(["sleep", "60"], timeout_s=0.1)
