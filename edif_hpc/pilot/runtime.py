"""The pilot: our process on the host side of an allocation.

It makes the keys on the node and registers them with the allocation's one-time join token, starts the worker, watches it,
starts it again when it dies early, passes signals on as a drain, and tells the relay at once when the worker's process is
gone, so that nobody waits for a lease to expire. What it did is in `exit.json`.

If the pilot itself is killed, the worker notices (see `worker_process`): it finishes what runs and leaves.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from edif_hpc.clock import Clock
from edif_hpc.errors import LaunchError
from edif_hpc.pilot.link import PilotLink
from edif_hpc.pilot.restart import Restart, after_exit
from edif_hpc.pilot.worker_process import WorkerProcess
from edif_hpc.slurm.order import PilotOrder, WorkerOrder, write_order
from edif_hpc.wire.sockets import KeyPair

_log = logging.getLogger(__name__)

_JOIN_TRIES = 8


@dataclass(kw_only=True)
class Pilot:
    """One allocation's pilot."""

    order: PilotOrder
    clock: Clock
    #: Of this process, for what is started; None passes it on unseen.
    environ: Mapping[str, str] | None = None
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _starts: int = 0

    async def run(self) -> str:
        """Serve until the worker has left; returns the cause."""
        began = self.clock.monotonic()
        worker_keys, pilot_keys = KeyPair.generate(), KeyPair.generate()
        joined = await self._join(worker_keys.public, pilot_keys.public)
        link = PilotLink(
            endpoint=joined["endpoint"],
            server_key=joined["server_key"],
            keys=pilot_keys,
            clock=self.clock,
        )
        order_file = self._write_worker_order(joined, worker_keys)
        cause = "the pilot failed"
        try:
            cause = await self._keep_alive(order_file, link)
        except LaunchError as error:
            cause = str(error)
            raise
        finally:
            order_file.unlink(missing_ok=True)
            record = {
                "cause": cause,
                "seconds": round(self.clock.monotonic() - began, 1),
                "worker_starts": self._starts,
            }
            order_file.with_name("exit.json").write_text(json.dumps(record))
            await link.goodbye(cause)
        return cause

    def stop(self) -> None:
        """A signal: drain the worker, then leave."""
        self._stop.set()

    def _write_worker_order(self, joined: Mapping[str, Any], keys: KeyPair) -> Path:
        scratch = Path(os.path.expandvars(self.order.scratch))  # variables of this node
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = scratch / "worker.order"
        order = WorkerOrder(
            name=self.order.name,
            endpoint=joined["endpoint"],
            server_key=joined["server_key"],
            public_key=keys.public,
            secret_key=keys.secret,
            scratch=str(scratch / "worker"),
            engine=self.order.engine,
        )
        write_order(path, order)
        return path

    async def _join(self, worker_key: str, pilot_key: str) -> dict[str, Any]:
        body = {
            "join_token": self.order.join_token,
            "worker_key": worker_key,
            "pilot_key": pilot_key,
            "node": os.uname().nodename,
        }
        seen = ""
        async with httpx.AsyncClient(timeout=30.0) as http:
            for attempt in range(_JOIN_TRIES):
                try:
                    response = await http.post(f"{self.order.relay_url}/api/join", json=body)
                except httpx.HTTPError as error:
                    seen = repr(error)
                else:
                    if response.is_success:
                        return dict(response.json())
                    seen = f"HTTP {response.status_code}: {response.text[:300]}"
                    if response.is_client_error:
                        break
                await asyncio.sleep(
                    min(30.0, 0.5 * 2**attempt)
                )  # back off from a relay that is away
        raise LaunchError(
            f"the relay at {self.order.relay_url} did not let this allocation join ({seen})"
        )

    async def _keep_alive(self, order_file: Path, link: PilotLink) -> str:
        restart = Restart()
        while not self._stop.is_set():
            began = self.clock.monotonic()
            self._starts += 1
            code = await self._run_worker(order_file, link)
            restart = after_exit(
                restart,
                code=code,
                lived_s=self.clock.monotonic() - began,
                stopping=self._stop.is_set() or link.refused,
            )
            _log.info(
                "the worker ended",
                extra={"event": "worker_ended", "code": code, "next": restart.cause or "again"},
            )
            if restart.cause:
                return restart.cause
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), timeout=restart.delay_s)
        return "stopped"

    async def _run_worker(self, order_file: Path, link: PilotLink) -> int:
        nonce = secrets.token_hex(8)
        worker = await WorkerProcess.start(self.order, order_file, nonce, self.environ)
        link.report("worker_started", f"pid {worker.pid}", nonce=nonce)
        ending = asyncio.create_task(
            worker.end_on(self._stop.wait(), link.until_refused()), name="end-worker"
        )
        code = await worker.ended()
        ending.cancel()
        await asyncio.gather(ending, return_exceptions=True)
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        link.report("worker_exited", f"{worker.tail}\n{how}", nonce=nonce)
        return code
