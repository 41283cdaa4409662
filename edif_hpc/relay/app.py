"""The relay's composition root: the one place where its parts are made and joined, and its main.

store ── writer ─┐
objects, blobs ──┼── core ──┬── HTTP (nnsight clients, operators, signed links)
clock, secrets ──┘          └── router (ZeroMQ: workers, pilots)
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.routing import BaseRoute

from edif_hpc.clock import Clock, SystemClock
from edif_hpc.domain.people import Role, Token, format_token, secret_hash
from edif_hpc.errors import Conflict, SettingsError, StoreUnavailable
from edif_hpc.failpoints import Failpoints
from edif_hpc.objects.directory import BlobFolder
from edif_hpc.objects.signing import Signer
from edif_hpc.relay import http
from edif_hpc.relay.accounts import Accounts
from edif_hpc.relay.broker import Broker
from edif_hpc.relay.core import Core
from edif_hpc.relay.door import raise_descriptor_limit
from edif_hpc.relay.fleet import Fleet
from edif_hpc.relay.launcher_api import LauncherApi
from edif_hpc.relay.object_store import open_objects
from edif_hpc.relay.sessions import Sessions
from edif_hpc.settings import RelaySettings
from edif_hpc.store.sqlite import SqliteStore
from edif_hpc.store.writer import Writer
from edif_hpc.telemetry import set_up_logging
from edif_hpc.wire.sockets import KeyPair, Router

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataDir:
    """The files of a relay."""

    root: Path

    @property
    def database(self) -> Path:
        """The queue."""
        return self.root / "queue.sqlite"

    @property
    def keys(self) -> Path:
        """The CURVE key pair that workers know this relay by."""
        return self.root / "relay.key"

    @property
    def link_secret(self) -> Path:
        """What signs links."""
        return self.root / "links.secret"


def init_data_dir(settings: RelaySettings, *, operator_name: str) -> str:
    """Make a relay's data directory with its keys, and its first operator token; returns the token's text.

    Raises:
        Conflict: there is a relay in this directory already.
    """
    data = DataDir(root=settings.data_dir)
    if data.keys.exists():
        raise Conflict(
            f"{data.root} holds a relay already; start it with `edif-hpc relay serve`, or choose another --data-dir"
        )
    try:
        data.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        data.root.chmod(0o700)
    except OSError as error:
        raise StoreUnavailable(
            f"cannot make the data directory {data.root}: {error.strerror}; choose another --data-dir"
        ) from error
    now, secret = SystemClock().wall(), secrets.token_urlsafe(32)
    token = Token(
        id=secrets.token_hex(6),
        name=operator_name,
        role=Role.OPERATOR,
        secret_sha256=secret_hash(secret),
        created_at=now,
    )
    store = SqliteStore(data.database)
    store.open()
    try:
        Writer(store).run(lambda opened: opened.add_token(token))
    finally:
        store.close()
    data.link_secret.touch(mode=0o600)
    data.link_secret.write_bytes(secrets.token_bytes(32))
    KeyPair.generate().save(data.keys)
    return format_token(token.id, secret)


#: How long the loop may keep the store's thread from the interpreter, and the other way round. A commit
#: needs it for some microseconds at a time, often; with Python's 5 ms it would mostly wait.
SWITCH_S = 0.0005


class Relay:
    """One relay: made on a running loop by `start`, served by `run`."""

    def __init__(
        self,
        settings: RelaySettings,
        *,
        clock: Clock | None = None,
        extra_routes: Sequence[BaseRoute] = (),
    ) -> None:
        self._settings, self._clock, self._routes = settings, clock or SystemClock(), extra_routes
        self._failpoints = Failpoints.parse(settings.failpoints)
        self._data = DataDir(root=settings.data_dir)
        self._stopping = asyncio.Event()
        self.server: http.Server
        self.router: Router
        self.fleet: Fleet
        self.broker: Broker

    async def run(self) -> None:
        """Serve until `stop`; raises what made it impossible."""
        sys.setswitchinterval(SWITCH_S)
        raise_descriptor_limit()
        settings, clock, failpoints = self._settings, self._clock, self._failpoints
        keys, signer = self._secrets()
        store = SqliteStore(self._data.database, failpoints)
        store.open()
        writer = Writer(store, failpoints)
        try:
            blobs = BlobFolder(settings.data_dir / "blobs")
            objects = await open_objects(settings, signer=signer, clock=clock)
            accounts = Accounts(read=store.tokens, writer=writer, clock=clock)
            core = Core(
                settings,
                store=store,
                writer=writer,
                objects=objects,
                blobs=blobs,
                signer=signer,
                clock=clock,
                failpoints=failpoints,
                server_key=keys.public,
            )
            self.fleet, self.broker = core.fleet, core.broker
            accounts.restore()
            core.restore()
            sessions = Sessions()
            deps = http.Deps(
                settings=settings,
                clock=clock,
                broker=self.broker,
                fleet=self.fleet,
                accounts=accounts,
                sessions=sessions,
                blobs=blobs,
                objects=objects,
                signer=signer,
                launching=LauncherApi(
                    orders=core.orders,
                    slots=core.slots,
                    accounts=accounts,
                    addresses=self._addresses,
                ),
            )
            self.server = http.serve(http.build_app(deps, extra_routes=self._routes), settings)
            self.router = Router(
                bind=settings.worker_bind,
                keys=keys,
                known=core.gateway.known,
                on_batch=core.gateway.received,
            )
            core.attach(
                self.router,
                endpoint=self._endpoint,
                base_url=self._base_url,
            )
            writer.start()
            await self._serve(writer, core)
        finally:
            await writer.stop()
            store.close()

    def stop(self) -> None:
        """End `run`. Requests stay queued, leases stay with their workers."""
        self._stopping.set()

    @property
    def _endpoint(self) -> str:
        """Where peers dial."""
        return self._settings.worker_endpoint or self.router.endpoint

    @property
    def _base_url(self) -> str:
        """Where workers reach our HTTP."""
        found = self._settings.worker_base_url or self._settings.public_url
        return found or self.server.url

    def _addresses(self) -> list[str]:
        """URLs of all that a compute node has to reach."""
        found = [self._endpoint, self._base_url]
        store = self._settings.s3_worker_endpoint or self._settings.s3_endpoint
        return [*found, store] if self._settings.s3_bucket and store else found

    async def _serve(self, writer: Writer, core: Core) -> None:
        tasks = {
            asyncio.create_task(self.server.run_until_stopped(), name="http"),
            asyncio.create_task(core.scheduler.run(), name="scheduler"),
            asyncio.create_task(core.slots.run(), name="slots"),
            asyncio.create_task(self._stopping.wait(), name="stop"),
        }
        watched: set[asyncio.Future[object]] = {*tasks, writer.died}  # type: ignore[arg-type]
        await self.server.ready.wait()
        _log.info(
            "serving %s, workers at %s",
            self.server.url,
            self.router.endpoint,
            extra={"event": "relay_ready", "url": self.server.url},
        )
        sys.stdout.write(f"relay ready: {self.server.url} (workers: {self.router.endpoint})\n")
        sys.stdout.flush()
        done, _ = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        self.server.stop()
        for task in tasks:
            if task.get_name() != "http":
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.router.stop_reading()
        await core.board.settle()
        await writer.stop()  # what is committed is still told
        self.router.close()
        for each in done:
            if (
                isinstance(each, asyncio.Task)
                and not each.cancelled()
                and each.exception() is not None
            ):
                raise each.exception() or StoreUnavailable("a part of the relay ended")
        if writer.died.done():
            raise StoreUnavailable(
                f"the store's writer died: {writer.died.result()}; the relay ends so that nothing is promised falsely"
            )

    def _secrets(self) -> tuple[KeyPair, Signer]:
        if not self._data.keys.exists():
            raise SettingsError(
                f"{self._data.root} holds no relay; make one with `edif-hpc relay init`"
            )
        return KeyPair.load(self._data.keys), Signer(secret=self._data.link_secret.read_bytes())


def serve(settings: RelaySettings, *, extra_routes: Sequence[BaseRoute] = ()) -> None:
    """Run a relay until SIGTERM or SIGINT."""
    set_up_logging(settings.log_level, process="relay")

    async def main() -> None:
        relay = Relay(settings, extra_routes=extra_routes)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, relay.stop)
        await relay.run()

    import uvloop  # noqa: PLC0415 - only a process that serves needs it

    uvloop.run(main())
