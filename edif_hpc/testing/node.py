"""A compute node without a route: a network namespace that reaches one address of this machine and nothing else.

    with serve_node() as node, outside_address() as address:
        node.command(["python", ...])     # runs there: it reaches node.login, but not `address`, where a relay may listen
        with serve_socks(node.login, folder) as proxy: ...     # real proxies, on the login node's side

It is what a login node with a private network looks like to its compute nodes. Namespaces take root.
"""

from __future__ import annotations

import os
import random
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from edif_hpc.testing.debian import PartMissing, install_packages, run
from edif_hpc.testing.stack import free_port
from edif_hpc.testing.wait import wait_until

_START_S: Final = 20.0
_TINYPROXY: Final = """
Listen {host}
Port {port}
Timeout 600
MaxClients 100
LogFile "{log}"
LogLevel Connect
"""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A compute node."""

    name: str
    login: str  #: the one address that it reaches

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` there."""
        return ["nsenter", f"--net=/run/netns/{self.name}", *argv]


@contextmanager
def serve_node() -> Iterator[Node]:
    """Have a compute node.

    Raises:
        PartMissing: this machine cannot have one.
    """
    _check_root()
    number = random.SystemRandom().randrange(1 << 14)
    name, ends = f"edif{number}", (f"ve{number}", f"vn{number}")
    base = f"10.231.{number >> 6}.{(number & 63) * 4}"
    login, own = (f"{base.rpartition('.')[0]}.{(number & 63) * 4 + each}" for each in (1, 2))
    inside = ["ip", "-n", name]
    run(["ip", "netns", "add", name])
    try:
        run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", name])
        run(["ip", "addr", "add", f"{login}/30", "dev", ends[0]])
        run(["ip", "link", "set", ends[0], "up"])
        run([*inside, "addr", "add", f"{own}/30", "dev", ends[1]])
        for link in (ends[1], "lo"):
            run([*inside, "link", "set", link, "up"])
        yield Node(name=name, login=login)
    finally:
        run(["ip", "netns", "del", name])


@contextmanager
def outside_address() -> Iterator[str]:
    """An address of this machine that no node reaches.

    Raises:
        PartMissing: this machine cannot have one.
    """
    _check_root()
    chance = random.SystemRandom()
    address = f"10.232.{chance.randrange(256)}.{chance.randrange(1, 255)}"
    run(["ip", "addr", "add", f"{address}/32", "dev", "lo"])
    try:
        yield address
    finally:
        run(["ip", "addr", "del", f"{address}/32", "dev", "lo"])


def _check_root() -> None:
    if os.geteuid() != 0:
        raise PartMissing("network namespaces take root")
    install_packages("iproute2", programs=["ip"])


@dataclass(kw_only=True)
class Program:
    """A program that listens; it may be killed and started again."""

    argv: list[str]
    host: str
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"{self.host}:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self._listens, _START_S, f"{self.argv[0]} listens on {self.address}")

    def kill(self) -> None:
        """End it at once."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((self.host, self.port)) == 0


@contextmanager
def serve_socks(host: str, folder: Path) -> Iterator[Program]:
    """Microsocks: a SOCKS5 proxy."""
    install_packages("microsocks", programs=["microsocks"])
    port = free_port()
    argv = ["microsocks", "-i", host, "-p", str(port)]
    yield from _served(Program(argv=argv, host=host, port=port, log=folder / "microsocks.log"))


@contextmanager
def serve_connect(host: str, folder: Path) -> Iterator[Program]:
    """Tinyproxy: an HTTP proxy."""
    install_packages("tinyproxy-bin", programs=["tinyproxy"])
    port, log = free_port(), folder / "tinyproxy.log"
    config = folder / "tinyproxy.conf"
    config.write_text(_TINYPROXY.format(host=host, port=port, log=folder / "tinyproxy-events.log"))
    argv = ["tinyproxy", "-d", "-c", str(config)]
    yield from _served(Program(argv=argv, host=host, port=port, log=log))


def _served(program: Program) -> Iterator[Program]:
    try:
        program.start()
        yield program
    finally:
        program.kill()
