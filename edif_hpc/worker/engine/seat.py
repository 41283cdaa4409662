"""One executor as the worker sees it: a socket, a process, a folder, a file for the result."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgpack

from edif_hpc.errors import EngineError, RemoteProtocolError
from edif_hpc.worker.engine.messages import (
    FROM_EXECUTOR,
    Broken,
    Done,
    Exited,
    Log,
    Ready,
    Refused,
    Run,
    Written,
)
from edif_hpc.worker.engine.protocol import FROM_EXECUTOR_BYTES, AsyncChannel, settle
from edif_hpc.worker.engine.request.console import Meter
from edif_hpc.worker.engine.rerun import Lacked, Turn
from edif_hpc.worker.engine.values import (
    INLINE_BYTES,
    REPORT_BYTES,
    Failed,
    FailureKind,
    Job,
    Limits,
    Outcome,
    Plain,
    Saved,
)
from edif_hpc.worker.engine.walls.folders import removed
from edif_hpc.worker.engine.walls.memory import Held

#: Of an outcome: its message and what it says of itself.
WORDS_BYTES = 128 * 1024


class Seat:
    """An executor from the order to fork it until nothing of it is left."""

    def __init__(self, number: int, scratch: Path) -> None:
        self.number = number
        self.folder = scratch / f"executor-{number}"
        self.result = scratch / f"result-{number}"
        self.folder.mkdir(mode=0o700)
        self.result_fd = os.open(
            self.result, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
        )
        ours, theirs = socket.socketpair()
        self.channel = AsyncChannel(ours, accepts=FROM_EXECUTOR, receive_limit=FROM_EXECUTOR_BYTES)
        self.theirs = theirs
        self.killed = False
        self.exited: asyncio.Future[Exited] = asyncio.get_running_loop().create_future()
        #: Held while a job is read from it: it may be gone before all that it said was heard.
        self.heard = asyncio.Lock()
        #: What it printed, once it runs a job.
        self.meter: Meter | None = None
        #: CPU time that it had used when it was ready.
        self.began_cpu_s = 0.0
        #: What it had of memory then, and which walls are around it.
        self.before = Held(private=0, mapped=0)
        self.steps: frozenset[str] = frozenset()
        self._pidfd: int | None = None
        self._keep_result = False

    def forked(self, pidfd: int) -> None:
        """Take the descriptor that stands for the process."""
        self._pidfd = pidfd
        if self.killed:
            self.kill()

    @property
    def pid(self) -> int | None:
        """The number of the process among those that this one sees; nothing if it is over, or not heard of yet."""
        if self._pidfd is None:
            return None
        facts = Path(f"/proc/self/fdinfo/{self._pidfd}").read_text().split()
        number = int(facts[facts.index("Pid:") + 1])
        return number if number > 0 else None

    def handed_over(self) -> None:
        """Close what only the executor needs."""
        self.theirs.close()
        if self.result_fd >= 0:
            os.close(self.result_fd)
            self.result_fd = -1

    def kill(self) -> None:
        """End the process, now or as soon as it exists."""
        self.killed = True
        if self._pidfd is not None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def gone(self) -> None:
        """Wait until the process is no more, whoever reaps it."""
        if self._pidfd is None:
            return
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        pidfd = os.dup(
            self._pidfd
        )  # the seat may be cleared meanwhile, by whoever hears of its end first
        loop.add_reader(pidfd, settle, ended)
        try:
            await ended
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    async def ready(self) -> Ready:
        """Wait until the executor can take a job; return what it says of itself.

        Raises:
            EngineError: it says that it will not be ready, and why.
            RemoteProtocolError: it says something else.
        """
        message, _ = await self.channel.receive()
        if isinstance(message, Refused):
            raise EngineError(message.message)
        if not isinstance(message, Ready):
            raise RemoteProtocolError(f"an executor begins with {type(message).__name__}")
        self.began_cpu_s, self.steps = message.cpu_s, frozenset(message.steps)
        self.before = Held(
            private=message.private_bytes,
            mapped=message.mapped_bytes,
            shared=message.shared_bytes,
        )
        return message

    async def run(
        self,
        job: Job,
        turn: Turn,
        on_log: Callable[[str], None],
        on_written: Callable[[Path, int], None],
    ) -> Outcome:
        """Hand over the job and return how it ended, as the executor says.

        Raises:
            PeerClosed: the executor died without saying.
            RemoteProtocolError: it said something that no executor of ours would.
            OverLimit: it prints more than it may, past our own code.
        """
        async with self.heard:
            await self._hand_over(job, turn)
            return await self._listen(job, on_log, on_written)

    async def _listen(
        self, job: Job, on_log: Callable[[str], None], on_written: Callable[[Path, int], None]
    ) -> Outcome:
        written = 0
        self.meter = meter = Meter(job.limits)
        while True:
            message, _ = await self.channel.receive()
            match message:
                case Log(text=text):
                    if (over := meter.over(text)) is not None:
                        raise over
                    on_log(text)
                    await asyncio.sleep(0)  # many lines at once must not hold up the loop
                case Written(size=size):
                    self._check(size, job.limits)
                    if size < written + REPORT_BYTES:
                        raise RemoteProtocolError(f"{size} bytes announced after {written}")
                    written = size
                    on_written(self.result, size)
                    await asyncio.sleep(0)
                case Done():
                    _check_words(message.meta)
                    return self._saved(message, job.limits)
                case Broken():
                    _check_words([message.message, message.meta])
                    return _failed(message, again=not written)
                case _:
                    raise RemoteProtocolError(f"{type(message).__name__} during a job")

    async def _hand_over(self, job: Job, turn: Turn) -> None:
        inline = (
            job.blob if isinstance(job.blob, bytes) and len(job.blob) <= INLINE_BYTES else None
        )
        run = Run(
            blob=inline,
            compress=job.compress,
            env=dict(job.env),
            model_key=job.model_key,
            seed=turn.seed,
            gradients=turn.gradients,
            limits=job.limits.numbers(),
            limit_sources=dict(job.limits.sources),
        )
        if inline is not None:
            await self.channel.send(run)
            return
        fd = _opened(job.blob)
        try:
            await self.channel.send(run, [fd])
        finally:
            os.close(fd)

    def _saved(self, done: Done, limits: Limits) -> Saved:
        """Check what the executor claims against what is there."""
        if done.inline is not None:
            if len(done.inline) != done.size:
                raise RemoteProtocolError(f"{len(done.inline)} bytes announced as {done.size}")
            return Saved(inline=done.inline, file=None, size=done.size, meta=done.meta)
        self._check(done.size, limits)
        self._keep_result = True
        return Saved(inline=None, file=self.result, size=done.size, meta=done.meta)

    def _check(self, size: int, limits: Limits) -> None:
        found = self.result.stat().st_size
        if not size <= found <= limits.result_bytes:
            raise RemoteProtocolError(f"{size} bytes announced in a file of {found}")

    def confirm(self, saved: Saved) -> None:
        """Look once more at the result's file, now that the executor cannot change it.

        Raises:
            RemoteProtocolError: it is not as large as announced; the file is removed.
        """
        found = self.result.stat().st_size
        if found != saved.size:
            self.result.unlink()
            raise RemoteProtocolError(f"{saved.size} bytes announced in a file of {found}")

    def clear(self) -> None:
        """Remove what is left of an executor that was reaped."""
        self.handed_over()
        self.channel.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if not self._keep_result:
            self.result.unlink(missing_ok=True)
        try:
            self.folder.rmdir()
        except OSError:
            # What the code left may be a lot; the loop must not wait for it.
            asyncio.get_running_loop().run_in_executor(None, removed, self.folder)


def _check_words(told: Plain) -> None:
    """Refuse more words than any executor of ours would say: they are kept as long as the request is."""
    size = len(msgpack.packb(told))
    if size > WORDS_BYTES:
        raise RemoteProtocolError(f"{size} bytes of words, above the limit of {WORDS_BYTES}")


def _failed(broken: Broken, *, again: bool) -> Failed:
    """Return how a run failed; `again` is whether another may follow.

    It may not when a part of the result is with the worker already: that cannot be taken back.
    """
    kind = _kind(broken.kind)
    lacked = again and broken.lacked_gradients
    return (Lacked if lacked else Failed)(kind=kind, message=broken.message, meta=broken.meta)


def _kind(name: str) -> FailureKind:
    """Take the executor's word for the kinds that only it can know."""
    if name in {FailureKind.USER, FailureKind.OOM, FailureKind.LIMIT}:
        return FailureKind(name)
    raise RemoteProtocolError(f"an executor says it failed as {name!r:.40}")


def _opened(blob: bytes | Path) -> int:
    """Return a descriptor to read a blob from that is too large for a frame."""
    if isinstance(blob, Path):
        return os.open(blob, os.O_RDONLY | os.O_CLOEXEC)
    fd = os.memfd_create("blob", os.MFD_CLOEXEC)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(blob)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
