"""A site: the facts of one cluster, as its operator wrote them into a TOML file.

What differs between clusters is data, never code: the names of partitions, how a GPU is asked for, how long an allocation
may last, where the shared folder is. `slurm/*.toml` in the repository are commented examples to copy. A file is checked as
a whole when it is read; an unknown key is refused by name, because a misspelt limit that is ignored would be found out by
the cluster's administrators.

What is per GPU (`cpus`, `mem_gb`) is multiplied for an allocation with several.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args

import msgspec

from edif_hpc.errors import SettingsError
from edif_hpc.slurm.order import EngineFacts, Route, RouteKind, Vendor

Scheduler = Literal["local", "slurm"]

#: Options of sbatch that every submission sets by itself; a site that set them too would undo what we rely on.
OWNED: Final = frozenset(
    """
    account array begin chdir comment constraint cpus-per-task dependency error exclude export
    export-file gres hold job-name kill-on-invalid-dep mem mem-per-cpu no-requeue nodes ntasks
    ntasks-per-node open-mode output parsable partition qos requeue reservation signal
    test-only time time-min wait wrap
    """.split()  # noqa: SIM905 - a list of forty lines tells no more
)

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,31}", re.ASCII)
_GRES = re.compile(r"[A-Za-z0-9_/.-]+(:[A-Za-z0-9_.-]+)?", re.ASCII)
_OPTION = re.compile(r"[a-z][a-z-]+", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_PLAIN = re.compile(r"[^\s\x00-\x1f]+")
_IN_SCRIPT = re.compile(r"[^\s%\\\x00-\x1f]+")
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}", re.ASCII)
_LINE = re.compile(r"[^\n\x00]+")

_T = TypeVar("_T", bound=msgspec.Struct)


class Container(msgspec.Struct, frozen=True, kw_only=True):
    """The image that workers run in."""

    image: str  #: path of a SIF, readable on the nodes
    sha256: str | None = None  #: what the image must hash to
    apptainer: str = "apptainer"  #: the program, by name or path
    binds: tuple[str, ...] = ()  #: more folders, as `--bind` wants them
    env: Mapping[str, str] = {}  #: more variables inside


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of GPU that can be asked for, and all that asking for it takes."""

    partition: str
    gres: str  #: what --gres calls one of them, without a number: gpu:a6000
    vendor: Vendor
    max_walltime_min: int
    cpus: int  #: cores for each GPU
    mem_gb: int  #: main memory for each GPU
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    options: Mapping[str, str] = {}  #: more long options of sbatch; an empty value for one without


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much we ask of the scheduler."""

    max_pending: int = 4  #: allocations that may wait at a time


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """The facts of one cluster."""

    name: str
    scheduler: Scheduler
    state_dir: Path  #: for us alone, and on a file system that login and compute nodes share
    scratch: str = "/tmp"  # noqa: S108 - fast and local to a node; variables are expanded there
    python: str = (
        ""  #: the interpreter with edif-hpc, as nodes see it; empty takes the submitter's own
    )
    setup: tuple[str, ...] = ()  #: lines of bash before the pilot, after /etc/profile
    route: RouteKind = "direct"  #: how compute nodes get out to the relay
    proxy: str = ""  #: HOST:PORT of what the route goes through
    compute_may_submit: bool = (
        True  #: whether sbatch works on compute nodes, so that pilots may submit their successors
    )
    kill_wait_s: int = 30  #: from SIGTERM to SIGKILL: KillWait of `scontrol show config`
    container: Container | None = None
    engine: EngineFacts = EngineFacts()  #: where models come from, and how much of a node is used
    gpus: Mapping[str, Gpu] = {}
    limits: Limits = Limits()

    @property
    def forward_file(self) -> Path:
        """Where the forwarder on a login node says where it is."""
        return self.state_dir / "forward.json"

    @property
    def way_out(self) -> Route:
        """The route, as pilots are told."""
        found = str(self.forward_file) if self.route == "login" else ""
        return Route(kind=self.route, proxy=self.proxy, forward_file=found)


def holding(folder: Path, private: Iterable[Path]) -> Path | None:
    """The first of the private places that lie in a folder, if any does."""
    real = folder.resolve()
    return next((each for each in private if each.resolve().is_relative_to(real)), None)


def load_site(path: Path) -> Site:
    """Read and check a site's file.

    Raises:
        SettingsError: it cannot be used; the message names the file and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the site file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"the site file {path} is not TOML: {error}") from error
    site = _Reader(path).site(content)
    if site.engine.hub_token is not None and path.stat().st_mode & 0o077:
        raise SettingsError(
            f"{path} holds a secret (engine.hub_token), and others may read it; chmod 600 {path}"
        )
    return site


class _Reader:
    """Checks the tables of one file, and says where in it something is wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def site(self, content: dict[str, Any]) -> Site:
        parts: dict[str, type[msgspec.Struct]] = {
            "container": Container,
            "engine": EngineFacts,
            "limits": Limits,
        }
        read: dict[str, Any] = {
            name: self._table(name, content[name], kind)
            for name, kind in parts.items()
            if name in content
        }
        read["gpus"] = {
            name: self._gpu(f"gpus.{name}", table)
            for name, table in self._tables("gpus", content.get("gpus", {})).items()
        }
        rest = {name: value for name, value in content.items() if name not in read}
        bare = self._table("", rest, Site)
        site = msgspec.structs.replace(bare, state_dir=bare.state_dir.expanduser(), **read)
        self._check_site(site)
        return site

    def _tables(self, where: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._wrong(where, f"must be a table, [{where}.NAME], not {value!r}")
        for name in value:
            self._must(
                _NAME, f"{where}.{name}", name, "a name of small letters, digits and dashes"
            )
        return value

    def _table(self, where: str, value: Any, kind: type[_T]) -> _T:
        if not isinstance(value, dict):
            raise self._wrong(where, f"must be a table, [{where}], not {value!r}")
        valid = {each.name: each.type for each in msgspec.structs.fields(kind)}
        unknown = sorted(set(value) - set(valid))
        if unknown:
            known = f"valid are: {', '.join(valid)}"
            raise self._wrong(where, f"no such key: {', '.join(unknown)}; {known}")
        try:
            return msgspec.convert(value, kind, dec_hook=lambda as_, text: as_(text))
        except msgspec.ValidationError as error:
            said, _, place = str(error).partition(" - at `$")
            place = place.rstrip("`")
            choice = (
                get_args(valid.get(place.lstrip("."))) if said.startswith("Invalid enum") else ()
            )
            use = f"; use one of: {', '.join(choice)}" if choice else ""
            raise self._wrong(where + place, said + use) from error

    def _gpu(self, where: str, value: Any) -> Gpu:
        gpu = self._table(where, value, Gpu)
        for name in ("cpus", "mem_gb", "max_walltime_min"):
            if getattr(gpu, name) < 1:
                raise self._wrong(
                    f"{where}.{name}", f"is {getattr(gpu, name)}; it must be 1 or more"
                )
        self._must(_GRES, f"{where}.gres", gpu.gres, "TYPE or TYPE:MODEL, without a number")
        for name in ("partition", "account", "qos", "constraint", "reservation"):
            if getattr(gpu, name) is not None:
                self._must(_PLAIN, f"{where}.{name}", getattr(gpu, name), "one word")
        for option, text in gpu.options.items():
            place = f"{where}.options.{option}"
            self._must(_OPTION, place, option, "a long option of sbatch, without its dashes")
            if option in OWNED:
                raise self._wrong(place, "is set by edif-hpc itself, and cannot be set here")
            if text:
                self._must(_LINE, place, text, "one line")
        return gpu

    def _check_site(self, site: Site) -> None:
        self._must(_NAME, "name", site.name, "a name of small letters, digits and dashes")
        self._check_state_dir(site)
        if site.scheduler == "slurm" and not site.gpus:
            raise self._wrong(
                "gpus", "is missing; a Slurm site needs at least one table [gpus.NAME]"
            )
        self._check_route(site)
        self._check_readable(site)
        if site.kill_wait_s < 1:
            raise self._wrong("kill_wait_s", f"is {site.kill_wait_s}; it must be 1 or more")
        for line in site.setup:
            self._must(_LINE, "setup", line, "one line for each entry")
        if site.container is not None and site.container.sha256 is not None:
            self._must(_SHA256, "container.sha256", site.container.sha256, "64 hexadecimal digits")
        for name, value in msgspec.structs.asdict(site.limits).items():
            if value < 1:
                raise self._wrong(f"limits.{name}", f"is {value}; it must be 1 or more")

    def _check_state_dir(self, site: Site) -> None:
        if not site.state_dir.is_absolute():
            raise self._wrong(
                "state_dir", f"is {str(site.state_dir)!r}; it must be an absolute path"
            )
        if (
            site.scheduler == "slurm"
        ):  # sbatch reads it in a line of a script, where % is for job ids
            path = str(site.state_dir)
            self._must(_IN_SCRIPT, "state_dir", path, "a path without spaces, % and backslashes")

    def _check_readable(self, site: Site) -> None:
        """What requests may read must be named in full, and hold none of our secrets."""
        for name in ("stores", "libraries"):
            for folder in getattr(site.engine, name):
                where, path = f"engine.{name}", Path(folder)
                if not path.is_absolute() or ".." in path.parts:
                    raise self._wrong(where, f"has {folder!r}; it must be an absolute path")
                held = holding(path, (site.state_dir, Path.home()))
                if held is not None:
                    raise self._wrong(
                        where,
                        f"has {folder!r}, where every request may read then; {held} is in it: name a smaller folder",
                    )

    def _check_route(self, site: Site) -> None:
        if site.proxy:
            self._must(_HOST_PORT, "proxy", site.proxy, "HOST:PORT")
        if site.route in ("socks", "connect") and not site.proxy:
            raise self._wrong(
                "proxy", f"is missing; the route {site.route!r} needs it, as HOST:PORT"
            )
        if site.route == "direct" and site.proxy:
            raise self._wrong(
                "proxy", f"is {site.proxy!r}, but the route is 'direct'; set route too, or neither"
            )

    def _must(self, pattern: re.Pattern[str], where: str, text: str, what: str) -> None:
        if pattern.fullmatch(text) is None:
            raise self._wrong(where, f"is {text!r}; it must be {what}")

    def _wrong(self, where: str, what: str) -> SettingsError:
        place = where.lstrip(".")
        return SettingsError(f"{self._path}: {place + ': ' if place else ''}{what}")
