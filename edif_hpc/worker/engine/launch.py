"""Starting the zygote from the worker's side, and following it until it ends.

The zygote is a program of its own, not a fork: it gets an environment written out here, one descriptor,
and nothing else of the worker, which holds keys. What it writes to its standard error is kept in part,
because that is where the reason lies when it cannot even speak the protocol. What lies at a hub, model
and adapters, is fetched first, by another program that alone has the network and the hub's token.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process, create_subprocess_exec
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edif_hpc.domain.adapter import Adapter
from edif_hpc.errors import EngineError, IsolationTooWeak
from edif_hpc.worker.engine import environment
from edif_hpc.worker.engine.messages import (
    FROM_FETCH,
    FROM_ZYGOTE,
    Fetched,
    Load,
    Loaded,
    Loading,
    Message,
    Refused,
)
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, AsyncChannel, PeerClosed
from edif_hpc.worker.engine.values import (
    EngineInfo,
    EngineSpec,
    Isolation,
    Job,
    Level,
    Plain,
    Progress,
)
from edif_hpc.worker.engine.walls.folders import removed
from edif_hpc.worker.engine.walls.watch import Watch

STDERR_LINES = 40
FETCH, ZYGOTE = f"{__package__}.model.fetch", f"{__package__}.zygote"

OnProgress = Callable[[Progress], None]
Expected = TypeVar("Expected", Fetched, Loaded)


class Program:
    """One of the engine's programs, running, and the channel to it."""

    def __init__(self, name: str, process: Process, channel: AsyncChannel) -> None:
        self._name = name
        self.process = process
        self.channel = channel
        #: What keeps an eye on the executors that it forks.
        self.watch = Watch()
        self._stderr: deque[str] = deque(maxlen=STDERR_LINES)

    @classmethod
    async def start(
        cls,
        module: str,
        accepts: Sequence[type[Message]],
        arguments: Sequence[str],
        environment: dict[str, str],
        folder: Path,
    ) -> Program:
        """Execute a module, which says what is in `accepts`; its first argument is its control socket."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                module,
                str(theirs.fileno()),
                *arguments,
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=PIPE,
                env=environment,
                cwd=folder,
                pass_fds=[theirs.fileno()],
            )
        channel = AsyncChannel(ours, accepts=accepts, receive_limit=FROM_ZYGOTE_BYTES, max_fds=1)
        return cls(module.rpartition(".")[2], process, channel)

    async def expect(self, kind: type[Expected], on_progress: OnProgress) -> Expected:
        """Pass on what it says about loading until it says `kind`; return that.

        Raises:
            IsolationTooWeak: it cannot confine executors as much as it has to.
            EngineError: it cannot load.
        """
        while True:
            try:
                message, _ = await self.channel.receive()
            except PeerClosed as error:
                raise EngineError(await self.ended()) from error
            match message:
                case Loading(stage=stage, done=done, total=total):
                    on_progress(Progress(stage=stage, done=done, total=total))
                case Refused(code=code, message=text):
                    weak = code == IsolationTooWeak.code
                    raise (IsolationTooWeak if weak else EngineError)(text)
                case _ if isinstance(message, kind):
                    return message
                case _:
                    raise EngineError(f"the {self._name} says {type(message).__name__}")

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
        lines = " | ".join(self._stderr) or "none"
        return f"the {self._name} ended by {cause}; its last lines: {lines}"

    def kill(self) -> None:
        """End it, and with it all that it started."""
        if self.process.returncode is None:
            self.process.kill()


async def _fetched(spec: EngineSpec, on_progress: OnProgress) -> Fetched:
    """Have the model's files on this machine; return where, and of which commit."""
    optional = {
        "HF_ENDPOINT": spec.hub_endpoint,
        "HF_HUB_CACHE": spec.hub_cache and str(spec.hub_cache),
        "HF_TOKEN": spec.hub_token,
        "ALL_PROXY": spec.proxy,
    }
    variables = environment.of_program(spec) | {k: v for k, v in optional.items() if v}
    arguments = [spec.source, spec.revision or "", *map(str, spec.adapters)]
    program = await Program.start(FETCH, FROM_FETCH, arguments, variables, spec.scratch)
    try:
        return await program.expect(Fetched, on_progress)
    finally:
        program.kill()
        await program.process.wait()
        program.channel.close()


async def launched(
    spec: EngineSpec, on_progress: OnProgress, module: str = ZYGOTE, arguments: Sequence[str] = ()
) -> Program:
    """Have the model's files here, start the zygote, which is `module`, and tell it what to load."""
    environment.home(spec.scratch).mkdir(mode=0o700)
    source = await _fetched(spec, on_progress)
    variables = {**environment.of_program(spec), **environment.OFFLINE}
    given = [str(os.getpid()), *arguments]
    program = await Program.start(module, FROM_ZYGOTE, given, variables, spec.scratch)
    load = Load(
        model_key=spec.model_key,
        more_tasks=list(spec.more_tasks),
        folder=source.folder,
        commit=source.commit,
        adapters=source.adapters,
        dtype=spec.dtype,
        device=spec.device,
        threads=spec.threads,
        scratch=str(spec.scratch),
        scratch_bytes=spec.scratch_bytes,
        ceiling=str(spec.ceiling),
        floor=str(spec.floor),
        driver=environment.of_driver(spec),
        devices=spec.devices,
        weights=spec.weights,
        stores=list(spec.stores),
        libraries=list(spec.libraries),
    )
    await program.channel.send(load)
    return program


#: How a pool comes by its zygote.
Launch = Callable[[EngineSpec, OnProgress], Awaitable[Program]]


def emptied(folder: Path) -> None:
    """Make the folder, and remove what an engine before left in it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.iterdir():
        if left.is_dir() and not left.is_symlink():
            removed(left)
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


def trials(blobs: Mapping[str, bytes], adapters: Sequence[Adapter]) -> Iterator[tuple[str, Job]]:
    """Yield the jobs by which an engine is tried, and what each is of: each task, and the first with each adapter."""
    first = next(iter(blobs))
    tests: list[tuple[str, str, dict[str, Plain]]] = [(f"of {key}", key, {}) for key in blobs]
    tests += [
        (f"with the adapter {each.repo_id}", first, {"peft": each.repo_id}) for each in adapters
    ]
    for which, key, env in tests:
        yield (
            which,
            Job(
                request_id="self-test",
                attempt=0,
                blob=blobs[key],
                compress=True,
                env=env,
                model_key=key,
            ),
        )
