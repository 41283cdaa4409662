"""A relay's core on a real socket, a real database and a real thread; workers whose engine obeys the test.

    async with a_world(tmp_path) as world:
        worker = await world.worker()             # the real loop of a worker, a `ScriptedEngine`
        request = await world.relay.accept()
        await world.runs(worker, request)
        worker.engine.end(request, saved(b"r"))
        await world.relay.ended(request)

`World.peer` is a bare connection, for what no real worker says.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edif_hpc.clock import SystemClock
from edif_hpc.domain.deployment import Deployment
from edif_hpc.domain.request import Limits, NewRequest, Request
from edif_hpc.errors import StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.directory import BlobFolder, DirectoryStore
from edif_hpc.objects.signing import Signer
from edif_hpc.relay import http
from edif_hpc.relay.accounts import Accounts
from edif_hpc.relay.core import Core
from edif_hpc.relay.launcher_api import LauncherApi
from edif_hpc.relay.sessions import Session, Sessions, Update
from edif_hpc.settings import RelaySettings
from edif_hpc.slurm.order import WorkerExit
from edif_hpc.store.sqlite import SqliteStore
from edif_hpc.store.writer import Writer
from edif_hpc.testing.engine import ScriptedEngine
from edif_hpc.testing.peer import Peer, until
from edif_hpc.wire.sockets import Dealer, KeyPair, Router
from edif_hpc.worker.runtime import WorkerRuntime
from edif_hpc.worker.transfer import Transfer

LEASE_S, HEARTBEAT_S = 3.0, 0.2
PART_BYTES = 64 << 10
MODEL_KEY = "nnsight.modeling.transformers.TransformersModel:{}"


class Disk(SqliteStore):
    """Counts its commits, and is full when a test says so."""

    commits = 0
    full = False

    def _commit(self) -> None:
        if self.full:
            self._rollback()
            raise StoreUnavailable("the disk is full")
        super()._commit()
        self.commits += 1


@dataclass
class Relay:
    """A relay that can be stopped and started again on its data, address and keys."""

    root: Path
    keys: KeyPair = field(default_factory=KeyPair.generate)
    bind: str = "tcp://127.0.0.1:*"
    port: int = 0
    failpoints: str = ""
    disk: Disk = field(init=False)
    core: Core = field(init=False)
    router: Router = field(init=False)
    writer: Writer = field(init=False)
    objects: DirectoryStore = field(init=False)
    accounts: Accounts = field(init=False)
    told: dict[str, list[Update]] = field(default_factory=dict)  #: what clients heard
    _clients: list[asyncio.Task[None]] = field(default_factory=list)
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)
    _server: http.Server | None = None
    _names: int = 0

    async def start(self) -> None:
        """Serve, on what was left by a start before."""
        settings = RelaySettings(
            lease_s=LEASE_S, heartbeat_s=HEARTBEAT_S, port=self.port, ws_grace_s=1.0
        )
        clock, signer = SystemClock(), Signer(secret=b"s" * 32)
        failpoints = Failpoints.parse(self.failpoints)
        self.disk = Disk(self.root / "queue.sqlite", failpoints)
        self.disk.open()
        self.writer = Writer(self.disk, failpoints)
        self.objects = DirectoryStore(
            self.root / "results", signer=signer, clock=clock, part_bytes=PART_BYTES
        )
        blobs = BlobFolder(self.root / "blobs")
        self.core = Core(
            settings,
            store=self.disk,
            writer=self.writer,
            objects=self.objects,
            blobs=blobs,
            signer=signer,
            clock=clock,
            failpoints=failpoints,
            server_key=self.keys.public,
        )
        self.writer.start()
        self.core.restore()
        self.accounts = Accounts(read=self.disk.tokens, writer=self.writer, clock=clock)
        self.accounts.restore()
        deps = http.Deps(
            settings=settings,
            clock=clock,
            broker=self.core.broker,
            fleet=self.core.fleet,
            accounts=self.accounts,
            launching=LauncherApi(
                orders=self.core.orders, slots=self.core.slots, accounts=self.accounts
            ),
            sessions=Sessions(),
            blobs=blobs,
            objects=self.objects,
            signer=signer,
        )
        self._server = http.serve(http.build_app(deps), settings)
        self.router = Router(
            bind=self.bind,
            keys=self.keys,
            known=self.core.gateway.known,
            on_batch=self.core.gateway.received,
        )
        self.core.attach(self.router, endpoint=self.router.endpoint, base_url=self._server.url)
        self._tasks = [
            asyncio.create_task(self._server.run_until_stopped()),
            asyncio.create_task(self.core.scheduler.run()),
            asyncio.create_task(self.core.slots.run()),
        ]
        await self._server.ready.wait()
        self.bind, self.port = self.router.endpoint, self._server.port

    async def stop(self) -> None:
        """Orderly, as `relay.app` does it."""
        if not self._tasks:
            return
        for each in self._clients:
            each.cancel()
        self.told.clear()
        if self._server is not None:
            self._server.stop()
        _, *timers = self._tasks
        for each in timers:
            each.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.router.stop_reading()
        await self.core.board.settle()
        await self.writer.stop()
        self.router.close()
        self.disk.close()
        self._tasks = []

    async def restart(self) -> None:
        """Stop in order, and start again; clients are gone."""
        await self.stop()
        await self.start()

    # -- what operators and clients do

    async def deploy(self, **facts: Any) -> None:
        """Add the deployment `tiny`."""
        values = {"name": "tiny", "repo_id": "a/b", "revision": None, "task": "text-generation"}
        await self.core.fleet.add_deployment(Deployment(**values | facts))

    async def join(self) -> tuple[KeyPair, KeyPair, str]:
        """A new allocation: the keys of its worker and of its pilot, and its id."""
        taken = len(self.core.fleet.processes())
        (made,) = await self.core.fleet.allocate("tiny", site="local", slots=taken + 1)
        worker, pilot = KeyPair.generate(), KeyPair.generate()
        await self.core.fleet.join(
            made["join_token"], worker_key=worker.public, pilot_key=pilot.public, node="n1"
        )
        return worker, pilot, made["allocation"].id

    async def accept(
        self, *, owner: str = "ada", blob: bytes = b"blob", listen: bool = True
    ) -> str:
        """A request comes; small blobs lie in the row, larger ones in the folder."""
        name = f"{self._names:032x}"
        self._names += 1
        now = SystemClock().wall()
        new = NewRequest(
            id=name,
            owner=owner,
            deployment="tiny",
            model_key=MODEL_KEY,
            compress=False,
            env={},
            blob_bytes=len(blob),
            blob_sha256=hashlib.sha256(blob).hexdigest(),
            limits=Limits(),
            accepted_at=now,
            expires_at=now + 3600,
        )
        session = Session(id=name, owner=owner, base_url="http://x") if listen else None
        given: bytes | Path = blob
        if len(blob) > 64 << 10:
            given = self.root / "blobs" / f".{secrets.token_hex(16)}"
            given.write_bytes(blob)
        await self.core.broker.accept(new, given, session)
        if session is not None:
            self.told[name] = []
            self._clients.append(asyncio.create_task(self._listen(session)))
        return name

    async def _listen(self, session: Session) -> None:
        while True:
            self.told[session.id].append(await session.next())

    def row(self, request: str) -> Request:
        """A request as it is stored."""
        found = self.disk.get(request)
        if found is None:
            raise LookupError(f"there is no row of {request}")
        return found

    async def ended(self, request: str) -> Request:
        """Wait until a request has ended, and its client was told."""
        told = self.told.get(request)

        def over() -> bool:
            heard = told is None or any(each.final for each in told)
            return self.row(request).terminal and heard

        await until(over, f"{request} ends")
        return self.row(request)

    def ends(self, request: str) -> list[str | None]:
        """How its attempts ended, the first first."""
        return [each.end for each in self.disk.attempts(request)]


@dataclass
class Worker:
    """A real worker's loop with a scripted engine."""

    runtime: WorkerRuntime
    engine: ScriptedEngine
    dealer: Dealer
    key: str
    allocation: str
    exit: asyncio.Task[WorkerExit]
    pilot: KeyPair


@dataclass
class World:
    """What a test begins with."""

    relay: Relay
    scratch: Path
    workers: list[Worker] = field(default_factory=list)
    peers: list[Peer] = field(default_factory=list)

    async def peer(self, keys: KeyPair | None = None) -> Peer:
        """A bare connection, by default with a worker's key of its own."""
        peer = Peer()
        self.peers.append(peer)
        own = keys if keys is not None else (await self.relay.join())[0]
        peer.dial(self.relay.router.endpoint, self.relay.keys.public, own)
        return peer

    async def worker(self, **engine: Any) -> Worker:
        """A worker that is warm, unless its engine is told to load."""
        keys, pilot, allocation = await self.relay.join()
        scratch = self.scratch / keys.public.encode().hex()
        scratch.mkdir()
        scripted = ScriptedEngine(**engine)
        runtime = WorkerRuntime(
            make_engine=lambda _: scripted,
            transfer=Transfer(),
            scratch=scratch,
            clock=SystemClock(),
            failpoints=Failpoints(),
            nonce=secrets.token_hex(8),
        )
        dealer = Dealer(
            endpoint=self.relay.router.endpoint,
            server_key=self.relay.keys.public,
            keys=keys,
            on_batch=runtime.received,
            on_event=runtime.saw,
        )
        worker = Worker(
            runtime=runtime,
            engine=scripted,
            dealer=dealer,
            key=keys.public,
            allocation=allocation,
            exit=asyncio.create_task(runtime.run(dealer)),
            pilot=pilot,
        )
        self.workers.append(worker)
        if not engine.get("loading") and "refusal" not in engine:
            await until(lambda: worker.key in self.serving(), "the worker serves")
        return worker

    def serving(self) -> list[str]:
        """The keys of the workers that may be given leases."""
        found = self.relay.core.fleet.serving("tiny")
        return [each.peer.key for each in found if each.window]

    async def runs(self, worker: Worker, request: str) -> None:
        """Wait until an executor of this worker has a request."""
        await until(lambda: request in worker.engine.running, f"{request} runs")

    def short_runs(self) -> None:
        """Teach the relay that requests are short, so that workers may prefetch."""
        for _ in range(8):
            self.relay.core.fleet.times("tiny").add(0.1)

    async def close(self) -> None:
        """End everything."""
        for worker in self.workers:
            worker.exit.cancel()
        await asyncio.gather(*(each.exit for each in self.workers), return_exceptions=True)
        for peer in self.peers:
            await peer.close()
        await self.relay.stop()


@asynccontextmanager
async def a_world(root: Path) -> AsyncIterator[World]:
    """A relay with the deployment `tiny` and no workers."""
    relay = Relay(root=root)
    await relay.start()
    await relay.deploy()
    scratch = root / "scratch"
    scratch.mkdir()
    world = World(relay=relay, scratch=scratch)
    try:
        yield world
    finally:
        await world.close()
