from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from edif_hpc.errors import SettingsError
from edif_hpc.failpoints import KNOWN, FailpointReached, Failpoints


def test_unarmed_points_do_nothing() -> None:
    failpoints = Failpoints.parse("")
    for name in KNOWN:
        failpoints.hit(name)


def test_acts_on_the_nth_hit_and_only_then() -> None:
    failpoints = Failpoints.parse("store.commit.before=raise@3")
    failpoints.hit("store.commit.before")
    failpoints.hit("store.commit.after")
    failpoints.hit("store.commit.before")
    with pytest.raises(FailpointReached, match=r"'store\.commit\.before'.* 3\. time"):
        failpoints.hit("store.commit.before")
    failpoints.hit("store.commit.before")


def test_each_name_counts_for_itself() -> None:
    failpoints = Failpoints.parse("store.commit.before=raise@2, store.commit.after=raise")
    failpoints.hit("store.commit.before")
    with pytest.raises(FailpointReached):
        failpoints.hit("store.commit.after")


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("store.commit.befor=kill", "known: .*store.commit.before"),
        ("store.commit.before=explode", "known: kill, raise, stop"),
        ("store.commit.before", "name=action"),
        ("store.commit.before=kill@0", "count from 1"),
        ("store.commit.before=kill@", "count from 1"),
        ("store.commit.before=kill@-1", "count from 1"),
        ("store.commit.before=kill,store.commit.before=stop", "armed twice"),
    ],
)
def test_a_wrong_spec_is_refused_and_says_what_is_valid(spec: str, complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        Failpoints.parse(spec)


def test_known_names_are_dotted_words() -> None:
    assert all(re.fullmatch(r"[a-z]+(\.[a-z_]+)+", name) for name in KNOWN)


def start_victim(spec: str) -> subprocess.Popen[str]:
    program = (
        "import sys; from edif_hpc.failpoints import Failpoints; "
        "f = Failpoints.parse(sys.argv[1]); f.hit('store.commit.before'); print('survived')"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, spec], stdout=subprocess.PIPE, text=True
    )


def test_kill_ends_the_process_at_once() -> None:
    with start_victim("store.commit.before=kill") as victim:
        output, _ = victim.communicate(timeout=30)
    assert (victim.returncode, output) == (-signal.SIGKILL, "")


def test_stop_hangs_the_process_until_someone_continues_it() -> None:
    with start_victim("store.commit.before=stop") as victim:
        _, status = os.waitpid(victim.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        victim.send_signal(signal.SIGCONT)
        output, _ = victim.communicate(timeout=30)
    assert (victim.returncode, output) == (0, "survived\n")
