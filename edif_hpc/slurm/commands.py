"""Running Slurm's programs: never for longer than a limit, and so that their answers mean one thing.

People set `SQUEUE_STATES`, `SLURM_TIME_FORMAT` and the like in their profiles, and inside an allocation there are dozens of
`SLURM_*` that `sbatch` would take over or pass on. Of all these only what tells where the controller is stays; times come
in one format and in UTC, so that no line is read in another's time zone, nor twice in the night when clocks go back.

Whoever calls Slurm takes a `Run`. The tests give one that runs as another user, or with other programs in its PATH.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

_SLURMS = ("SLURM", "SBATCH_", "SQUEUE_", "SCANCEL_", "SCONTROL_", "SRUN_", "SALLOC_", "SUBMITIT_")
_KEPT = {"SLURM_CONF", "SLURM_JWT"}
_ONE_MEANING = {"SLURM_TIME_FORMAT": "standard", "TZ": "UTC"}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a program said, and its exit code."""

    code: int
    out: str
    err: str


class Run(Protocol):
    """A way to run a program."""

    def __call__(self, argv: Sequence[str], *, timeout_s: float, stdin: str = "") -> Answer:
        """Run it to its end; `TimeoutError` if that takes too long, `OSError` if it cannot be started."""
        ...


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs programs on this machine: `prefix` goes before each, `environ` None takes our own."""

    prefix: tuple[str, ...] = ()
    environ: Mapping[str, str] | None = None

    def __call__(self, argv: Sequence[str], *, timeout_s: float, stdin: str = "") -> Answer:
        """Run one; what does not end in time is killed with all that it started in its session."""
        environ = own_environ() if self.environ is None else self.environ
        with subprocess.Popen(  # noqa: S603 - an argv, never a shell
            [*self.prefix, *argv],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=clean(environ), text=True, errors="replace", start_new_session=True,
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(stdin, timeout=timeout_s)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise TimeoutError(f"{argv[0]} did not answer within {timeout_s:g} s") from None
        return Answer(code=process.returncode, out=out, err=err.strip())


def own_environ() -> dict[str, str]:
    """The environment that this process was started with."""
    return dict(os.environ)  # noqa: TID251 - Slurm's programs need PATH, HOME and their configuration


def clean(environ: Mapping[str, str]) -> dict[str, str]:
    """What Slurm's programs are given of an environment."""
    kept = {
        name: value
        for name, value in environ.items()
        if name in _KEPT or not name.startswith(_SLURMS)
    }
    return kept | _ONE_MEANING
