"""What a request that may use a GPU can reach beyond others, tried on what every machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.worker.engine.walls import landlock
from edif_hpc.worker.engine.walls.jail import driver_nodes

#: How much the kernel's pool of random numbers holds: an ioctl that /dev/random takes from everybody.
PROGRAM = """
import fcntl, sys
from pathlib import Path
from edif_hpc.worker.engine.walls import landlock, syscalls
access = int(sys.argv[1])
syscalls.no_new_privs()
landlock.restrict([*landlock.rules([Path("/dev/random")], access)])
with open("/dev/random", "rb", buffering=0) as device:
    fcntl.ioctl(device, 0x80045200, bytes(4))
"""
IOCTL_ABI = 5
KEYRING = """
import ctypes
from edif_hpc.worker.engine.walls import syscalls
libc = ctypes.CDLL(None, use_errno=True)
SESSION = ctypes.c_int(-3)
def search():
    return libc.syscall(250, 10, SESSION, b"user", b"edif-test-ticket", 0)
syscalls.leave_keyring()
if libc.syscall(248, b"user", b"edif-test-ticket", b"x", 1, SESSION) < 0:
    raise NotImplementedError
print(search() > 0)
syscalls.leave_keyring()
print(search() > 0)
"""
THREADS = """
import resource, sys
from pathlib import Path
from edif_hpc.worker.engine.walls.jail import Jail, Layers
resource.setrlimit(resource.RLIMIT_NPROC, (5000, 5000))
jail = Jail(Layers(namespaces=False, landlock=False, seccomp=False))
jail.shut(Path(sys.argv[1]))
jail.enter(Path(sys.argv[1]))
print(resource.getrlimit(resource.RLIMIT_NPROC))
"""
IN_JAIL = """
import os, sys
from pathlib import Path
from edif_hpc.worker.engine.walls.jail import Jail, Layers
jail = Jail(Layers(namespaces=False, landlock=True, seccomp=True))
jail.shut(Path(sys.argv[1]), gpu=sys.argv[2] == "gpu")
jail.enter(Path(sys.argv[1]))
os.listdir("/sys/class")
"""


def complaint(program: str, *arguments: str) -> str:
    """What the program ends with: the type of an error, or nothing."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stderr.strip().rpartition("\n")[2].partition(":")[0]


@pytest.mark.parametrize(
    ("access", "said"), [(landlock.DEVICE, "PermissionError"), (landlock.DRIVER, "")]
)
def test_only_a_drivers_node_takes_ioctls(access: int, said: str) -> None:
    if landlock.abi() < IOCTL_ABI:
        absent("this kernel's Landlock knows nothing of ioctl")
    assert complaint(PROGRAM, str(access)) == said


@pytest.mark.parametrize(("device", "said"), [("cpu", "PermissionError"), ("gpu", "")])
def test_only_with_a_gpu_is_it_told_what_hardware_there_is(
    tmp_path: Path, device: str, said: str
) -> None:
    if not landlock.abi():
        absent("this kernel has no Landlock")
    assert complaint(IN_JAIL, str(tmp_path), device) == said


def test_a_rule_on_a_folder_of_nodes_lists_it(tmp_path: Path) -> None:
    node = tmp_path / "node"
    node.touch()
    rules = [*landlock.rules([tmp_path, node], landlock.DRIVER)]
    assert [rule.access for rule in rules] == [
        landlock.DRIVER,
        landlock.DRIVER & ~landlock.READ | landlock.DEVICE,
    ]
    for rule in rules:
        os.close(rule.fd)


def test_the_nodes_of_both_vendors_and_no_others(tmp_path: Path) -> None:
    wanted = ("nvidia-caps", "nvidia-uvm", "nvidia0", "nvidia1", "nvidiactl", "kfd", "dri")
    for each in (*wanted, "mem", "kmsg", "sda", "fuse"):
        (tmp_path / each).touch()
    assert [each.name for each in driver_nodes(tmp_path)] == list(wanted)


def printed(program: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if "NotImplementedError" in done.stderr:
        absent("this kernel keeps no keys, or none for us")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_keys_of_the_session_are_left_behind() -> None:
    assert printed(KEYRING) == ["True", "False"]


def test_threads_that_count_together_with_the_workers_leave_it_some(tmp_path: Path) -> None:
    assert printed(THREADS, str(tmp_path)) == ["(4744, 4744)"]
