"""A real S3 server for tests and benches: Ceph's object gateway over a store in memory.

Three daemons of Debian's own packages, all bound to 127.0.0.1: a monitor, one storage daemon that keeps its objects
in RAM, and the gateway that speaks S3. It checks signatures and their expiry, ranges, parts and quotas as a
university's Ceph does, because it is the same program. Nothing survives its end, and nothing else on the machine
is touched but for the packages: they are installed if they are missing, which needs root and apt. The daemons
themselves run as whoever calls, and die with their caller.

    with serve_s3(Path("/tmp/ceph")) as s3:
        s3.admin("bucket", "list")
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edif_hpc.objects.s3 import Place, S3Store
from edif_hpc.testing.debian import install_packages, run
from edif_hpc.testing.wait import wait_until

PACKAGES = ("ceph-mon", "ceph-osd", "radosgw", "ceph-common")
PROGRAMS = (
    "ceph-mon",
    "ceph-osd",
    "radosgw",
    "radosgw-admin",
    "ceph-authtool",
    "monmaptool",
    "ceph",
)
_CLUSTER = "5c1b0f6e-1d4e-4f0a-9a6e-0ed1f0000001"
_DISK = "5c1b0f6e-1d4e-4f0a-9a6e-0ed1f0000002"
_STORE_BYTES = 8 << 30
_START_S = 60.0

_CONF = """\
[global]
fsid = {cluster}
mon initial members = a
mon host = [v2:127.0.0.1:{mon}/0,v1:127.0.0.1:{mon_v1}/0]
public network = 127.0.0.0/8
keyring = {root}/keyring
auth allow insecure global id reclaim = false
run dir = {root}/run
admin socket = {root}/run/$name.$pid.asok
log file = {root}/log/$name.log
crash dir = {root}/log
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
mon allow pool size one = true
mon max pg per osd = 2000
[mon]
mon data = {root}/mon
mon data avail crit = 0
[osd]
osd data = {root}/osd
osd objectstore = memstore
memstore device bytes = {store_bytes}
osd max object name len = 256
osd max object namespace len = 64
[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {root}/rgw
rgw dns name = localhost
rgw gc obj min wait = 5
rgw gc processor period = 10
rgw bucket quota ttl = 0
rgw user quota bucket sync interval = 1
rgw user quota sync interval = 1
"""


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server and the user that it knows."""

    root: Path
    port: int
    access_key: str = "EDIFTESTKEY"
    secret_key: str = "ediftestsecret"  # noqa: S105 - of a server that lives for a test
    user: str = "edif"

    @property
    def url(self) -> str:
        """Its endpoint."""
        return f"http://127.0.0.1:{self.port}"

    def make_bucket(self, name: str) -> str:
        """Make a bucket; returns its name."""

        async def make() -> None:
            store = await S3Store.connect(self.place(name))
            await store.make_bucket()
            await store.close()

        asyncio.run(make())
        return name

    def place(self, bucket: str, **facts: Any) -> Place:
        """A bucket of this server, as the object store wants it described."""
        described = {
            "endpoint": self.url,
            "access_key": self.access_key,
            "secret_key": self.secret_key,
        }
        return Place(bucket=bucket, **{**described, **facts})

    def settings(self, bucket: str) -> dict[str, str]:
        """The relay's settings for a bucket of this server."""
        return {
            "s3_bucket": bucket,
            "s3_endpoint": self.url,
            "s3_access_key": self.access_key,
            "s3_secret_key": self.secret_key,
        }

    def limit(self, size_bytes: int | None) -> None:
        """Let each bucket hold so much; None lifts the limit."""
        scope = ("--quota-scope=bucket", f"--uid={self.user}")
        if size_bytes is not None:
            self.admin("quota", "set", *scope, f"--max-size={size_bytes}")
        self.admin("quota", "enable" if size_bytes is not None else "disable", *scope)

    def admin(self, *words: str) -> str:
        """Run `radosgw-admin`: users, quotas, statistics."""
        return run(["radosgw-admin", "-n", "client.rgw", *words], env=_environment(self.root))


@contextmanager
def serve_s3(root: Path) -> Iterator[S3Server]:
    """Start a server with its files below `root`, which must be new; stop it at the end.

    Raises:
        PartMissing: the packages are missing and cannot be installed.
        LaunchError: a daemon did not start; the message ends with its words.
    """
    install_packages(*PACKAGES, programs=PROGRAMS)
    server = S3Server(root=root, port=_free_ports(1)[0])
    with ExitStack() as daemons:
        _start(server, daemons)
        yield server


def _start(server: S3Server, daemons: ExitStack) -> None:
    root, env = server.root, _environment(server.root)
    for name in ("mon", "osd", "rgw", "run", "log"):
        (root / name).mkdir(parents=True, mode=0o755)
    daemons.callback(shutil.rmtree, root, ignore_errors=True)
    mon, mon_v1 = _free_ports(2)
    facts = {"mon": mon, "mon_v1": mon_v1, "root": root, "port": server.port}
    (root / "ceph.conf").write_text(
        _CONF.format(cluster=_CLUSTER, store_bytes=_STORE_BYTES, **facts)
    )
    _make_keys(root, env)
    _make_map(root, env, f"[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_v1}]")

    _daemon(["ceph-mon", "-i", "a"], root, daemons)
    run(["ceph", "osd", "create", _DISK], env=env)
    run(["ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", _DISK], env=env)
    _daemon(["ceph-osd", "-i", "0"], root, daemons)
    wait_until(
        lambda: "1 up" in run(["ceph", "osd", "stat"], env=env),
        _START_S,
        "the storage daemon is up",
    )
    _daemon(["radosgw", "-n", "client.rgw"], root, daemons)
    wait_until(lambda: _answers(server.url), _START_S, f"the gateway answers; its log: {root}/log")
    user = [f"--uid={server.user}", f"--display-name={server.user}"]
    keys = [f"--access-key={server.access_key}", f"--secret-key={server.secret_key}"]
    server.admin("user", "create", *user, *keys)


def _daemon(command: list[str], root: Path, daemons: ExitStack) -> None:
    """Start a daemon as a child that dies with us, however we die."""
    with (root / "log" / f"{command[0]}.out").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "-f"],  # noqa: S607 - found by PATH, as Ceph is
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment(root),
        )  # fmt: skip
    # The store is disposable, and the storage daemon takes long over a TERM.
    daemons.callback(process.wait)
    daemons.callback(process.kill)


def _make_map(root: Path, env: Mapping[str, str], address: str) -> None:
    monmap = str(root / "monmap")
    run(
        [
            "monmaptool",
            "--create",
            "--clobber",
            "--addv",
            "a",
            address,
            "--fsid",
            _CLUSTER,
            monmap,
        ],
        env=env,
    )
    run(
        ["ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", str(root / "keyring")],
        env=env,
    )


def _make_keys(root: Path, env: Mapping[str, str]) -> None:
    keyring = str(root / "keyring")
    all_caps = ["--cap", "mon", "allow *", "--cap", "osd", "allow *", "--cap", "mgr", "allow *"]
    run(
        [
            "ceph-authtool",
            keyring,
            "--create-keyring",
            "-n",
            "mon.",
            "--gen-key",
            "--cap",
            "mon",
            "allow *",
        ],
        env=env,
    )
    for name in ("client.admin", "client.rgw", "osd.0"):
        run(["ceph-authtool", keyring, "-n", name, "--gen-key", *all_caps], env=env)


def _environment(root: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "CEPH_CONF": str(root / "ceph.conf"),
        "CEPH_ARGS": "",
        "HOME": str(root),
    }


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2):  # noqa: S310 - our own loopback address
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def _free_ports(count: int) -> list[int]:
    with _reserved(count) as sockets:
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def _reserved(count: int) -> Iterator[list[socket.socket]]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        yield sockets
    finally:
        for each in sockets:
            each.close()
