"""The worker as a process of the pilot: how it is started, read, ended, and told of the pilot's own end.

On the host it is our own Python. In a container it is `apptainer`, which stays between pilot and worker, and hands signals
on to it; its exit code is the worker's. Either way the process has a session of its own, so that signals to the pilot's
group reach it once, from the pilot.

The worker is to leave when the pilot dies, however it dies. A host process asks the kernel for that. A container cannot:
the pilot is not in its process namespace, and with a set-uid Apptainer the kernel would forget the wish. It has the pilot's pipe
as standard input instead, which closes with the pilot.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from edif_hpc.errors import LaunchError
from edif_hpc.pilot.ending import CUT_SHORT, Ending
from edif_hpc.pilot.staging import staged
from edif_hpc.slurm import container
from edif_hpc.slurm.order import SERVED, ContainerOrder, PilotOrder, write_private

_log = logging.getLogger(__name__)

#: After it was to give back what it runs.
KILL_AFTER_S = 5.0
_TAIL_CHARS = 8000
_READ_BYTES = 64 << 10


class WorkerProcess:
    """One start of the worker."""

    def __init__(self, process: Process, scratch: Path) -> None:
        self._process, self._scratch = process, scratch
        self.pid = process.pid
        self.tail = ""  #: the end of what it said
        self._reading = asyncio.create_task(self._read(), name="read-worker")

    @property
    def requests(self) -> int:
        """How many requests it ran, once it has ended; 0 if it was killed before it could say."""
        try:
            return int((self._scratch / SERVED).read_text())
        except (OSError, ValueError):
            return 0

    @classmethod
    async def start(
        cls, order: PilotOrder, order_file: Path, nonce: str, environ: Mapping[str, str] | None
    ) -> WorkerProcess:
        """Start it, in its container if the order has one. `environ` is the pilot's; None passes it on unseen.

        Raises:
            LaunchError: its image is not to be had.
        """
        scratch = order_file.with_name("worker")
        arguments = ["-u", "-P", "-m", order.worker_module, str(order_file)]
        if order.container is None:
            command = [sys.executable, *arguments, str(os.getpid()), nonce]
            return cls(await _spawn(command, environ, stdin=DEVNULL), scratch)
        arguments = [order.container.python, *arguments, "0", nonce]
        layout = _layout(order, order_file.parent)
        known = environ or {}
        image = await _prepare(order.container, layout, known)
        command = container.exec_argv(order.container, layout, image=image, command=arguments)
        host = container.host_environment(layout, known)
        return cls(await _spawn(command, host, stdin=PIPE), scratch)

    async def ended(self) -> int:
        """Wait for its end; returns its exit code, negative for a signal. All that it said is in `tail` then."""
        code = await self._process.wait()
        self._kill_all()  # what a killed `apptainer` leaves, such as the server of its image's files
        await self._reading
        return code

    async def end_with(self, ending: Ending) -> None:
        """When the end begins, let it drain; when that takes too long, have it give back what it runs; then kill it."""
        await ending.until_begun()
        self._process.send_signal(signal.SIGTERM)
        await ending.until_over()
        _log.warning("the worker gives back what it runs", extra={"event": "worker_cut_short"})
        self._process.send_signal(CUT_SHORT[ending.cause])
        try:
            await asyncio.wait_for(asyncio.shield(self._process.wait()), timeout=KILL_AFTER_S)
        except TimeoutError:
            _log.warning("the worker did not leave", extra={"event": "worker_killed"})
            self._kill_all()

    def _kill_all(self) -> None:
        """Kill what is left of its session; Apptainer's helpers have process groups of their own."""
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(
                    ProcessLookupError, PermissionError
                ):  # it has ended, or is no business of ours
                    if os.getsid(int(entry.name)) == self.pid:
                        os.kill(int(entry.name), signal.SIGKILL)

    async def _read(self) -> None:
        if self._process.stdout is None:
            return
        while data := await self._process.stdout.read(_READ_BYTES):  # a line may be of any length
            text = data.decode(errors="replace")
            self.tail = (self.tail + text)[-_TAIL_CHARS:]
            sys.stdout.write(text)


async def _spawn(command: list[str], environ: Mapping[str, str] | None, *, stdin: int) -> Process:
    try:
        return await asyncio.create_subprocess_exec(
            *command, stdin=stdin, stdout=PIPE, stderr=STDOUT, env=environ, start_new_session=True
        )
    except OSError as error:
        raise LaunchError(
            f"{command[0]} cannot be started on this node: {error.strerror}; give the site the path of its apptainer"
        ) from error


def _layout(order: PilotOrder, scratch: Path) -> container.Layout:
    cache = Path(order.engine.hub_cache) if order.engine.hub_cache else None
    writable = cache is not None and (not cache.exists() or os.access(cache, os.W_OK))
    return container.Layout.below(
        scratch,
        hub_cache=cache,
        hub_cache_writable=writable,
        readable=tuple(map(Path, order.engine.readable)),
    )


async def _prepare(
    order: ContainerOrder, layout: container.Layout, environ: Mapping[str, str]
) -> Path:
    """Make what the container is given; returns the image to run."""
    for folder in layout.folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if layout.hub_cache is not None:
        layout.hub_cache.mkdir(parents=True, exist_ok=True)
    inside = container.environment(order, layout, environ)
    write_private(layout.env_file, container.env_file(inside).encode())
    copies = (
        Path(os.path.expandvars(order.copies))
        if order.copies
        else layout.scratch.with_name("images")
    )
    return await asyncio.to_thread(staged, Path(order.image), sha256=order.sha256, copies=copies)
