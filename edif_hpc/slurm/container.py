"""How a worker is started in an Apptainer container. Pure: values in, a command line and files' contents out.

The container is the second wall around users' code, and makes every node the same. It sees no home, nothing of the host's
/tmp and no other process; its image is read-only, its environment is what is written here. Paths mean the same inside as
outside, so that a message of the worker names a file that an operator can find. Let in are the scratch of the worker, the
cache of the hub, the site's stores and libraries, read-only, and the worker's order. The order is the only one with secrets, and it is a file of
mode 0600: command lines are public on a node, and environments are inherited.

Apptainer's own init is kept (no `--no-init`, no `--compat`): it is process 1 of the container, hands signals to the worker
and reaps what it leaves. Nothing here asks for root: user namespaces are enough, and inside them the worker's engine makes
its own.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.slurm.devices import visible_devices
from edif_hpc.slurm.order import ContainerOrder, Vendor

_GPU_FLAGS: Mapping[Vendor, tuple[str, ...]] = {
    "nvidia": ("--nv",),
    "amd": ("--rocm",),
    "none": (),
}
#: What the host side of Apptainer gets of the pilot's environment.
_HOST = ("PATH", "HOME", "USER", "LANG", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where one container finds its folders, on the node and inside alike."""

    scratch: Path  #: the worker's own; emptied at each start
    cache: Path  #: what Apptainer itself keeps, on the host
    tmp: Path  #: what it sees as /tmp
    order: Path  #: the worker's order
    env_file: Path
    hub_cache: Path | None = None
    hub_cache_writable: bool = True
    readable: tuple[Path, ...] = ()  #: stores and libraries, which requests may read

    @classmethod
    def below(
        cls,
        folder: Path,
        *,
        hub_cache: Path | None,
        hub_cache_writable: bool,
        readable: tuple[Path, ...] = (),
    ) -> Layout:
        """The layout in a pilot's scratch."""
        return cls(
            scratch=folder / "worker",
            cache=folder / "cache",
            tmp=folder / "tmp",
            order=folder / "worker.order",
            env_file=folder / "worker.env",
            hub_cache=hub_cache,
            hub_cache_writable=hub_cache_writable,
            readable=readable,
        )

    @property
    def folders(self) -> tuple[Path, ...]:
        """What has to exist before the container starts."""
        return (self.scratch, self.cache, self.tmp)


def exec_argv(
    order: ContainerOrder, layout: Layout, *, image: Path, command: Sequence[str]
) -> list[str]:
    """The command line that runs `command` in the container; `image` is the copy that was checked."""
    mounts = [
        _mount(layout.tmp, "/tmp"),  # noqa: S108 - the container's own
        _mount(layout.scratch),
        _mount(layout.order, writable=False),
    ]
    if layout.hub_cache is not None:
        mounts.append(_mount(layout.hub_cache, writable=layout.hub_cache_writable))
    mounts += [_mount(each, writable=False) for each in layout.readable]
    return [
        order.apptainer,
        "--quiet",
        "exec",
        "--containall",
        "--no-home",
        "--no-eval",
        *_GPU_FLAGS[order.vendor],
        "--pwd",
        "/",
        "--env-file",
        str(layout.env_file),
        *(f"--mount={each}" for each in mounts),
        *(f"--bind={each}" for each in order.binds),
        str(image),
        *command,
    ]


def environment(
    order: ContainerOrder, layout: Layout, environ: Mapping[str, str]
) -> dict[str, str]:
    """What the worker's environment says: where it lives, which devices to use, and what the site adds.

    The engine's programs get environments of their own (`worker.engine.environment`), with places for their caches.
    """
    return {
        "HOME": str(layout.scratch),
        "TMPDIR": "/tmp",  # noqa: S108 - the container's own
        "PYTHONDONTWRITEBYTECODE": "1",
        **visible_devices(environ, order.vendor),
        **order.env,
    }


def env_file(values: Mapping[str, str]) -> str:
    """The text of a file for `--env-file`, which Apptainer reads as shell."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items())


def host_environment(layout: Layout, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of the `apptainer` program itself, which keeps its files out of the home."""
    own = {
        "APPTAINER_CONFIGDIR": str(layout.cache / "apptainer"),
        "APPTAINER_CACHEDIR": str(layout.cache / "apptainer"),
        "APPTAINER_TMPDIR": str(layout.tmp),
    }
    return {name: environ[name] for name in _HOST if name in environ} | own


def _mount(path: Path, inside: str | None = None, *, writable: bool = True) -> str:
    """A line of CSV, which says any path: `--bind` would split it at colons and commas."""
    fields = ["type=bind", f"source={path}", f"destination={inside or path}"]
    quoted = ['"' + each.replace('"', '""') + '"' for each in fields]
    return ",".join([*quoted, *([] if writable else ["ro"])])
