"""The text of a site's file: what is known is set, what is not known is there as a comment that says how to find out.

The file belongs to the operator from then on, so it is written once, with comments, for reading and changing by hand. What a
probe finds out later goes into the one line that was left open; whatever an operator has set is never changed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edif_hpc.errors import Conflict
from edif_hpc.slurm.order import Vendor
from edif_hpc.slurm.site import load_site

_OPEN = "# compute_may_submit = true"
_SET = re.compile(r"^\s*compute_may_submit\s*=", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class GpuEntry:
    """A table [gpus.NAME]."""

    name: str
    partition: str
    gres: str
    vendor: Vendor
    max_walltime_min: int
    cpus: int
    mem_gb: int
    account: str | None = None
    qos: str | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """All that goes into a file."""

    name: str
    cluster: str  #: what it calls itself, for the first line
    state_dir: str
    scratch: str
    python: str | None
    setup: tuple[str, ...]
    image: str | None
    hub_cache: str | None
    compute_may_submit: bool | None
    kill_wait_s: int | None
    gpus: tuple[GpuEntry, ...]
    route: str = "direct"
    proxy: str | None = None


def text_of(answers: Answers) -> str:
    """The file."""
    return "\n".join(_lines(answers)) + "\n"


def write(path: Path, text: str, *, force: bool) -> None:
    """Put it there for its owner alone, if it is a file that can be read.

    Raises:
        Conflict: there is one already.
        SettingsError: this text is no site.
    """
    if path.exists() and not force:
        raise Conflict(f"{path} exists; look at it with: edif-hpc site check {path.stem}; --force writes it anew")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        load_site(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def with_may_submit(text: str, *, may: bool) -> str | None:
    """The text with what a probe found out; None if an operator has set it."""
    if _SET.search(text):
        return None
    line = f"compute_may_submit = {str(may).lower()}"
    open_line = re.compile(r"^#\s*compute_may_submit\s*=.*$", re.MULTILINE)
    if open_line.search(text):
        return open_line.sub(line, text, count=1)
    # Keys of the file itself come before its first table.
    head, bracket, tables = text.partition("\n[")
    return f"{head.rstrip()}\n\n{line}\n{bracket}{tables}" if bracket else f"{head.rstrip()}\n{line}\n"  # fmt: skip


def _lines(a: Answers) -> Iterator[str]:
    yield f"# The cluster {a.cluster}, as `edif-hpc site init` found it. Change what is wrong, then: edif-hpc site check {a.name}"
    yield ""
    yield f"name = {_quoted(a.name)}"
    yield 'scheduler = "slurm"'
    yield ""
    yield "# For edif-hpc alone (mode 0700), on a file system that login and compute nodes share: job scripts, orders, logs."
    yield f"state_dir = {_quoted(a.state_dir)}"
    yield ""
    yield "# Fast storage of one node, for the image and the weights. Variables are expanded on the node."
    yield f"scratch = {_quoted(a.scratch)}"
    yield ""
    yield "# The Python that has edif-hpc, as compute nodes see it. Left out, it is the one that submits."
    yield _line("python", _quoted(a.python) if a.python else None, '"/home/me/venv/bin/python"')
    yield ""
    yield "# Lines of bash before our own process, after /etc/profile. Where apptainer is a module, load it here."
    setup = ", ".join(map(_quoted, a.setup))
    yield _line("setup", f"[{setup}]" if a.setup else None, '["module load apptainer"]')
    yield ""
    yield "# Whether sbatch works on compute nodes. `edif-hpc site check --probe` finds out; if not, only a launcher submits."
    may = a.compute_may_submit
    yield _OPEN if may is None else f"compute_may_submit = {str(may).lower()}"
    yield ""
    yield "# From SIGTERM to SIGKILL: KillWait of `scontrol show config`."
    yield _line("kill_wait_s", str(a.kill_wait_s) if a.kill_wait_s else None, "30")
    yield ""
    yield "# How nodes get out to the relay (docs/howto/routes.md): direct, socks, connect or login."
    yield f"route = {_quoted(a.route)}"
    yield _line("proxy", _quoted(a.proxy) if a.proxy else None, '"proxy.example.org:3128"')
    yield ""
    yield from _container(a.image)
    yield ""
    yield "# Where workers get models from. Left out, it is the Hub, and a cache on the scratch."
    yield "[engine]" if a.hub_cache else "# [engine]"
    yield _line("hub_cache", _quoted(a.hub_cache) if a.hub_cache else None, '"/shared/models"')
    yield "# Folders that requests may read, and folders of more Python packages (docs/howto/libraries.md)."
    yield '# stores = ["/shared/datasets"]'
    yield '# libraries = ["/shared/python"]'
    for gpu in a.gpus:
        yield ""
        yield from _gpu(gpu)
    yield ""
    yield "# So many allocations may wait in the queue at a time."
    yield "[limits]"
    yield "max_pending = 4"


def _container(image: str | None) -> Iterator[str]:
    yield "# The image that workers run in (docs/howto/images.md). Without one they run on the host, by the Python above."
    yield "[container]" if image else "# [container]"
    yield _line("image", _quoted(image) if image else None, '"/shared/edif-hpc-worker-cuda.sif"')
    yield '# sha256 = "…"  # what it must hash to; scripts/build-image prints it'
    yield '# apptainer = "apptainer"'
    yield '# binds = ["/shared/models:/shared/models:ro"]'


def _gpu(gpu: GpuEntry) -> Iterator[str]:
    if gpu.note:
        yield f"# {gpu.note}"
    yield f"[gpus.{gpu.name}]"
    yield f"partition = {_quoted(gpu.partition)}"
    yield f"gres = {_quoted(gpu.gres)}"
    yield f"vendor = {_quoted(gpu.vendor)}"
    yield f"max_walltime_min = {gpu.max_walltime_min}"
    yield f"cpus = {gpu.cpus}      # for each GPU"
    yield f"mem_gb = {gpu.mem_gb}    # for each GPU"
    yield _line("account", _quoted(gpu.account) if gpu.account else None, '"my-project"')
    yield _line("qos", _quoted(gpu.qos) if gpu.qos else None, '"normal"')


def _line(key: str, value: str | None, example: str) -> str:
    return f"# {key} = {example}" if value is None else f"{key} = {value}"


def _quoted(text: str) -> str:
    """A string of TOML, whose escapes are those of JSON."""
    return json.dumps(text, ensure_ascii=False)
