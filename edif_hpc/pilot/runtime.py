"""The pilot: our process on the host side of an allocation.

It makes the keys on the node and registers them with the allocation's one-time join token, starts the worker, watches it,
starts it again when it dies early and walltime is left, and tells the relay at once when the worker's process is gone, so that
nobody waits for a lease to expire. When the end comes near (`ending`) it lets the worker drain; meanwhile it submits its
successor, if it may (`revive`). What it did is in `exit.json`, in the allocation's folder.

A pilot that ends before the relay knows it (no scratch, no route) cannot say why, and its log lies where few people look. So it leaves
its last words in the site's shared `state_dir` (`unheard/`), from where a launcher brings them to the relay.

If the pilot itself is killed, the worker notices (see `worker_process`): it finishes what runs and leaves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import signal
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from edif_hpc.clock import Clock
from edif_hpc.errors import EdifError, LaunchError
from edif_hpc.pilot.ending import REFUSED, WARNINGS, Ending
from edif_hpc.pilot.joining import join
from edif_hpc.pilot.lifetime import JOB_ID, Lifetime
from edif_hpc.pilot.link import PilotLink
from edif_hpc.pilot.restart import Restart, after_exit
from edif_hpc.pilot.revive import Reviving
from edif_hpc.pilot.route import Way, way_out
from edif_hpc.pilot.scratch import own_folder
from edif_hpc.pilot.worker_process import WorkerProcess
from edif_hpc.slurm.order import PilotOrder, WorkerOrder, write_order
from edif_hpc.slurm.ordering import Ordering
from edif_hpc.slurm.site import Site
from edif_hpc.slurm.status import Slurm
from edif_hpc.slurm.submit import SlurmSubmitter
from edif_hpc.slurm.unheard import LastWords, leave_words
from edif_hpc.wire.sockets import KeyPair

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

_NODE_NAME = "SLURMD_NODENAME"
#: A scheduler that preempts us waits for nobody.
_ASK_S = 5.0


@dataclass(kw_only=True)
class Pilot:
    """One allocation's pilot."""

    order: PilotOrder
    clock: Clock
    #: Of this process, for what is started; None passes it on unseen.
    environ: Mapping[str, str] | None = None
    site: Site | None = None  #: where it may submit its successor; None leaves that to others
    ending: Ending = field(init=False)
    lifetime: Lifetime = field(init=False)
    _starts: int = 0
    _requests: int = 0
    _joined: bool = False
    _asking: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        environ = self.environ or {}
        self.ending = Ending(self.clock, term_s=self.order.term_s)
        self.lifetime = Lifetime(
            environ, clock=self.clock, ending=self.ending, ask=_asking(self.site, environ)
        )

    async def run(self) -> str:
        """Serve until the worker has left; returns the cause."""
        try:
            return await self._run()
        except (LaunchError, OSError) as error:
            if not self._joined:
                await asyncio.to_thread(self._leave_words, str(error))
            raise

    def signalled(self, number: signal.Signals) -> None:
        """A signal came."""
        if number in WARNINGS and self.lifetime.may_have_moved:
            self._asking = _aside(self._ask_first(number), "ask-for-end")
        else:
            self._told(number)

    async def _ask_first(self, number: signal.Signals) -> None:
        """A warning far from the end is preemption, unless an administrator has moved the end."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self.lifetime.refresh(), timeout=_ASK_S)
        self._told(number)

    def _told(self, number: signal.Signals) -> None:
        self.ending.signalled(number, self.lifetime.left_s)
        if number in WARNINGS:
            self.lifetime.warned()

    @property
    def _node(self) -> str:
        """This node as the scheduler calls it, which is the name to exclude it by; elsewhere as it calls itself."""
        return (self.environ or {}).get(_NODE_NAME) or os.uname().nodename

    async def _run(self) -> str:
        began = self.clock.monotonic()
        scratch = Path(os.path.expandvars(self.order.scratch))  # variables of this node
        if "$" in str(scratch):
            raise LaunchError(
                f"no scratch on {self._node}: {self.order.scratch} names a variable that is not set there; correct "
                "`scratch` of the site"
            )
        cause = "the pilot failed"
        with own_folder(scratch, keep=not self.order.folder):
            try:
                async with way_out(self.order.route) as way:
                    cause = await self._serve(scratch, way)
            except (EdifError, OSError) as error:
                cause = str(error)
                raise
            finally:
                folder = Path(self.order.folder) if self.order.folder else scratch
                self._record(folder, cause, seconds=self.clock.monotonic() - began)
        return cause

    def _record(self, folder: Path, cause: str, *, seconds: float) -> None:
        record = {
            "cause": cause,
            "seconds": round(seconds, 1),
            "requests": self._requests,
            "worker_starts": self._starts,
            "node": self._node,
            "job_id": self.lifetime.id,
            "left_s": self.lifetime.left_s,
        }
        try:
            (folder / "exit.json").write_text(json.dumps(record))
        except OSError as error:  # what else is to be done at the end does not depend on it
            extra = {"event": "no_record", "folder": str(folder)}
            _log.error("no record of this allocation: %s", error, extra=extra)

    def _leave_words(self, detail: str) -> None:
        if not self.order.folder:
            return
        words = LastWords(name=self.order.name, node=self._node, detail=detail)
        try:
            leave_words(Path(self.order.folder).parent, words)
        except OSError as error:
            _log.error("no last words: %s", error, extra={"event": "words_lost"})

    async def _serve(self, scratch: Path, way: Way) -> str:
        worker_keys, pilot_keys = KeyPair.generate(), KeyPair.generate()
        joining = join(
            self.order,
            way,
            worker_key=worker_keys.public,
            pilot_key=pilot_keys.public,
            node=self._node,
        )
        joined = await self._unless_it_ends(joining)
        if joined is None:
            return self.ending.cause
        link = PilotLink(
            endpoint=joined["endpoint"],
            server_key=joined["server_key"],
            keys=pilot_keys,
            clock=self.clock,
            job=self.lifetime,
        )
        self._joined = True
        order_file = scratch / "worker.order"
        cause = "the pilot failed"
        reviving = self._reviving(link)
        aside = [
            _aside(self.lifetime.watch(), "watch-walltime"),
            _aside(self._refused(link), "watch-refusal"),
            *([] if reviving is None else [_aside(reviving.run(), "revive")]),
        ]
        try:
            write_order(order_file, self._worker_order(joined, worker_keys, scratch, way))
            cause = await self._keep_alive(order_file, link)
            if reviving is not None and self.ending.begun:
                await reviving.last_chance()
        except (LaunchError, OSError) as error:
            cause = str(error)
            raise
        finally:
            with suppress(OSError):  # it goes with its folder, then
                order_file.unlink()
            for task in aside:
                task.cancel()
            await asyncio.gather(*aside, return_exceptions=True)
            await link.goodbye(cause)
        return cause

    async def _unless_it_ends(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """What some work gives; None if the end begins before."""
        working = asyncio.ensure_future(work)
        ends = asyncio.ensure_future(self.ending.until_begun())
        try:
            await asyncio.wait((working, ends), return_when=asyncio.FIRST_COMPLETED)
            return await working if working.done() else None
        finally:
            for each in (working, ends):
                each.cancel()

    def _reviving(self, link: PilotLink) -> Reviving | None:
        site = self.site
        if site is None or not site.compute_may_submit:
            return None
        ordering = Ordering(
            site=site,
            relay_url=self.order.relay_url,
            submitter=SlurmSubmitter(site),
            site_file=Path(self.order.site_file),
            worker_module=self.order.worker_module,
        )
        return Reviving(ordering=ordering, scheduler=Slurm(site), relay=link, ending=self.ending)

    async def _refused(self, link: PilotLink) -> None:
        await link.until_refused()
        self.ending.come(REFUSED, within_s=self.ending.term_s)

    def _worker_order(
        self, joined: Mapping[str, Any], keys: KeyPair, scratch: Path, way: Way
    ) -> WorkerOrder:
        return WorkerOrder(
            name=self.order.name,
            endpoint=joined["endpoint"],
            server_key=joined["server_key"],
            public_key=keys.public,
            secret_key=keys.secret,
            scratch=str(scratch / "worker"),
            engine=self.order.engine,
            proxy=way.proxy,
        )

    async def _keep_alive(self, order_file: Path, link: PilotLink) -> str:
        restart = Restart()
        while not self.ending.begun:
            began = self.clock.monotonic()
            self._starts += 1
            code = await self._run_worker(order_file, link)
            restart = after_exit(
                restart,
                code=code,
                lived_s=self.clock.monotonic() - began,
                ending=self.ending.cause,
                left_s=self.lifetime.left_s,
            )
            _log.info(
                "the worker ended",
                extra={"event": "worker_ended", "code": code, "next": restart.cause or "again"},
            )
            if restart.cause:
                return restart.cause
            with suppress(TimeoutError):
                await asyncio.wait_for(self.ending.until_begun(), timeout=restart.delay_s)
        return self.ending.cause

    async def _run_worker(self, order_file: Path, link: PilotLink) -> int:
        nonce = secrets.token_hex(8)
        worker = await WorkerProcess.start(self.order, order_file, nonce, self.environ)
        link.report("worker_started", f"pid {worker.pid}", nonce=nonce)
        end = asyncio.create_task(worker.end_with(self.ending), name="end-worker")
        code = await worker.ended()
        end.cancel()
        await asyncio.gather(end, return_exceptions=True)
        self._requests += worker.requests
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        link.report("worker_exited", f"{worker.tail}\n{how}", nonce=nonce)
        return code


def _asking(site: Site | None, environ: Mapping[str, str]) -> Callable[[], float | None] | None:
    """How the scheduler is asked for the end of this job, if there is one to ask."""
    job_id = environ.get(JOB_ID)
    return None if site is None or job_id is None else partial(Slurm(site).left_s, job_id)


def _aside(work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
    """A task beside the worker; if it fails the worker serves on, and the log says so."""
    task = asyncio.create_task(work, name=name)
    task.add_done_callback(_tell_failure)
    return task


def _tell_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        extra = {"event": "task_failed", "task": task.get_name()}
        _log.error("a task of the pilot failed", exc_info=error, extra=extra)
