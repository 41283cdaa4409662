"""Starting the zygote from the worker's side, and following it until it ends.

The zygote is a program of its own, not a fork: it gets an environment written out here, one descriptor,
and nothing else of the worker, which holds keys. What it writes to its standard error is kept in part,
because that is where the reason lies when it cannot even speak the protocol.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process, create_subprocess_exec
from collections import deque
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from edif_hpc.errors import EngineError, IsolationTooWeak
from edif_hpc.worker.engine.messages import FROM_ZYGOTE, Load, Loaded, Loading, Refused
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, AsyncChannel, PeerClosed
from edif_hpc.worker.engine.values import EngineInfo, EngineSpec, Isolation, Level, Progress

STDERR_LINES = 40


class ZygoteProcess:
    """The running zygote and the channel to it."""

    def __init__(self, process: Process, control: AsyncChannel) -> None:
        self.process = process
        self.control = control
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @classmethod
    async def launch(cls, spec: EngineSpec) -> ZygoteProcess:
        """Start it and tell it what to load."""
        _empty(spec.scratch)
        ours, theirs = socket.socketpair()
        with theirs:
            process = await create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "edif_hpc.worker.engine.zygote",
                str(theirs.fileno()),
                str(os.getpid()),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=_environment(spec),
                cwd=spec.scratch,
                pass_fds=[theirs.fileno()],
            )
        control = AsyncChannel(
            ours, accepts=FROM_ZYGOTE, receive_limit=FROM_ZYGOTE_BYTES, max_fds=1
        )
        told = {field.name: getattr(spec, field.name) for field in fields(Load)}
        as_text = {name: str(told[name]) for name in ("scratch", "ceiling", "floor")}
        await control.send(Load(**told | as_text))
        return cls(process, control)

    async def loaded(self, on_progress: Callable[[Progress], None]) -> Loaded:
        """Wait until it has loaded.

        Raises:
            IsolationTooWeak: it cannot confine executors as much as it has to.
            EngineError: it cannot load.
        """
        while True:
            try:
                message, _ = await self.control.receive()
            except PeerClosed as error:
                raise EngineError(await self.ended()) from error
            match message:
                case Loading(stage=stage, done=done, total=total):
                    on_progress(Progress(stage=stage, done=done, total=total))
                case Loaded():
                    return message
                case Refused(code=code, message=text):
                    weak = code == IsolationTooWeak.code
                    raise (IsolationTooWeak if weak else EngineError)(text)
                case _:
                    raise EngineError(f"the zygote says {type(message).__name__} while loading")

    async def follow_stderr(self) -> None:
        """Keep the last lines of its standard error until it ends."""
        stream = self.process.stderr
        if stream is None:
            return
        while data := await stream.read(4096):
            self._stderr.extend(data.decode(errors="replace").splitlines())

    async def ended(self) -> str:
        """Wait until it has ended, and tell how."""
        status = await self.process.wait()
        cause = signal.Signals(-status).name if status < 0 else f"status {status}"
        return f"the zygote ended by {cause}; its last lines: {' | '.join(self._stderr) or 'none'}"

    def kill(self) -> None:
        """End it, and with it all executors."""
        if self.process.returncode is None:
            self.process.kill()


def _environment(spec: EngineSpec) -> dict[str, str]:
    """Return the whole environment of the zygote; nothing of the worker's is inherited."""
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(spec.scratch),
        "TMPDIR": str(spec.scratch),
        "PYTHONPATH": str(Path(__file__).parents[3]),
        "PYTHONNOUSERSITE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # One thread before the fork, in every library that would make a pool.
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    optional = {
        "HF_ENDPOINT": spec.hub_endpoint,
        "HF_HUB_CACHE": spec.hub_cache and str(spec.hub_cache),
        "HF_TOKEN": spec.hub_token,
    }
    return environment | {name: value for name, value in optional.items() if value}


def _empty(folder: Path) -> None:
    """Make the folder, and remove what an engine before left in it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def described(loaded: Loaded) -> EngineInfo:
    """Turn what the zygote says into values.

    Raises:
        EngineError: a field is missing.
    """
    told: dict[str, Any] = dict(loaded.info)
    try:
        walls = told.pop("isolation")
        isolation = Isolation(
            level=Level(walls["level"]),
            steps=tuple(walls["steps"]),
            missing=tuple(walls["missing"]),
        )
        persistent = tuple(told.pop("persistent"))
        return EngineInfo(**told, persistent=persistent, isolation=isolation)
    except (KeyError, TypeError, ValueError) as error:
        raise EngineError(f"the zygote describes the model incompletely: {error!r}") from error
