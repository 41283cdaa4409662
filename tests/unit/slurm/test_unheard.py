"""Last words that wait for a launcher."""

from __future__ import annotations

import stat
from pathlib import Path

from edif_hpc.slurm.unheard import LastWords, find_words, forget_words, leave_words

ONE = LastWords(name="edif-a-0-1-x", node="n1", detail="no route")
TWO = LastWords(name="edif-b-0-1-y", node="n2", detail="no route")


def test_they_wait_until_they_are_heard(tmp_path: Path) -> None:
    assert find_words(tmp_path) == []
    for each in (ONE, TWO):
        leave_words(tmp_path, each)
    assert find_words(tmp_path) == [ONE, TWO]
    forget_words(tmp_path, [ONE])
    forget_words(tmp_path, [ONE])
    assert find_words(tmp_path) == [TWO]


def test_they_are_for_their_owner(tmp_path: Path) -> None:
    leave_words(tmp_path, ONE)
    (file,) = (tmp_path / "unheard").iterdir()
    modes = [stat.S_IMODE(each.stat().st_mode) for each in (file.parent, file)]
    assert modes == [0o700, 0o600]


def test_a_damaged_file_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    leave_words(tmp_path, ONE)
    (tmp_path / "unheard" / "a.json").write_text("{")
    assert find_words(tmp_path) == [ONE]
