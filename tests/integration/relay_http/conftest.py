"""A relay's HTTP surface on a real port, over a broker and a fleet that remember what they were asked."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import uvloop

from edif_hpc.domain.deployment import Deployment, ModelKey, find_deployment
from edif_hpc.domain.limits import Allowed, checked
from edif_hpc.domain.people import Role, Token
from edif_hpc.domain.request import NewRequest, Request, RequestState, ResultRef
from edif_hpc.errors import Conflict, NotAuthenticated, NotFound
from edif_hpc.objects.directory import BlobFolder, DirectoryStore
from edif_hpc.objects.signing import Signer
from edif_hpc.relay.accounts import Accounts
from edif_hpc.relay.http import Deps, Server, build_app, serve
from edif_hpc.relay.sessions import Session, Sessions, Update
from edif_hpc.relay.surroundings import surroundings
from edif_hpc.settings import RelaySettings
from edif_hpc.testing.clock import ManualClock

T = TypeVar("T")

MODEL_KEY = ModelKey(
    import_path="nnsight.modeling.transformers.TransformersModel",
    repo_id="edif/tiny-gpt2",
    revision=None,
    task="text-generation",
).render()
DEPLOYMENT = Deployment(
    name="tiny-gpt2", repo_id="edif/tiny-gpt2", revision=None, task="text-generation"
)
LIMIT_BYTES = 8 << 20
PART_BYTES = 3 << 20


class FakeWriter:
    """Runs each operation at once on a table of tokens."""

    def __init__(self) -> None:
        self.rows: dict[str, Token] = {}

    async def submit(self, op: Callable[[Any], T]) -> T:
        return op(self)

    def add_token(self, token: Token) -> None:
        self.rows[token.id] = token

    def limit_token(self, token_id: str, change: Callable[[Allowed], Allowed]) -> Token:
        if token_id not in self.rows:
            raise NotFound(f"there is no token {token_id}")
        old = self.rows[token_id]
        self.rows[token_id] = replace(old, limits=change(old.limits))
        return self.rows[token_id]

    def revoke_token(self, token_id: str, now: float) -> Token:
        if token_id not in self.rows:
            raise NotFound(f"there is no token {token_id}")
        self.rows[token_id] = replace(self.rows[token_id], revoked_at=now)
        return self.rows[token_id]


@dataclass
class FakeBroker:
    """Accepts everything and does with it what a test says."""

    blobs: BlobFolder
    signer: Signer
    clock: ManualClock
    requests: dict[str, Request] = field(default_factory=dict)
    updates: dict[str, Update] = field(default_factory=dict)
    bytes_of: dict[str, bytes] = field(default_factory=dict)
    results: dict[str, bytes | str] = field(default_factory=dict)
    closed: list[Session] = field(default_factory=list)
    cancelled: list[tuple[str, str]] = field(default_factory=list)
    on_accept: Callable[[Request, Session | None], None] = lambda *_: None
    failure: Exception | None = None
    views: int = 0

    async def accept(
        self, new: NewRequest, blob: bytes | Path, session: Session | None
    ) -> Request:
        if self.failure is not None:
            raise self.failure
        if isinstance(blob, Path):
            await asyncio.to_thread(self.blobs.keep, blob, new.id)
            blob = await asyncio.to_thread(self.blobs.path(new.id).read_bytes)
        self.bytes_of[new.id] = blob
        own = {each.name: getattr(new, each.name) for each in fields(new)}
        seq = len(self.requests) + 1
        request = Request(**own, seq=seq, state=RequestState.QUEUED, attempt=0, crashes=0)
        self.requests[new.id] = request
        self.show(Update(request_id=new.id, status="QUEUED", description="position 1"))
        self.on_accept(request, session)
        return request

    def show(self, update: Update) -> None:
        self.updates[update.request_id] = update

    def complete(self, request_id: str, data: bytes | str, size_bytes: int) -> None:
        """A result exists."""
        self.results[request_id] = data
        self.requests[request_id] = replace(
            self.requests[request_id],
            state=RequestState.COMPLETED,
            result=ResultRef(size_bytes=size_bytes, key=data if isinstance(data, str) else None),
        )
        self.show(Update(request_id=request_id, status="COMPLETED"))

    def holdings(self, owner: str) -> tuple[int, int]:
        own = [
            each for each in self.requests.values() if each.owner == owner and not each.terminal
        ]
        return len(own), sum(each.blob_bytes for each in own)

    async def view(self, request_id: str, base_url: str) -> tuple[Request, Update]:
        self.views += 1
        if self.failure is not None:
            raise self.failure
        if request_id not in self.requests:
            raise NotFound(f"there is no request {request_id}")
        update = self.updates[request_id]
        if update.status == "COMPLETED":
            until = self.clock.wall() + 60
            link = self.signer.link("GET", f"/results/{request_id}", expires_at=until)
            update = replace(update, data=base_url + link)
        return self.requests[request_id], update

    async def cancel(self, request_id: str, *, by: str) -> Request:
        self.cancelled.append((request_id, by))
        return self.requests[request_id]

    def session_closed(self, session: Session) -> None:
        self.closed.append(session)

    async def list_requests(
        self, *, owner: str | None, states: Iterable[RequestState], limit: int
    ) -> list[Request]:
        wanted = tuple(states)
        found = [
            each
            for each in self.requests.values()
            if owner in (None, each.owner) and (not wanted or each.state in wanted)
        ]
        return found[:limit]

    async def explain(self, request_id: str) -> dict[str, Any]:
        return {"id": request_id, "state": self.requests[request_id].state}

    async def result_bytes(self, request_id: str) -> bytes | str:
        if request_id not in self.results:
            raise NotFound(f"request {request_id} has no result")
        return self.results[request_id]


@dataclass
class FakeFleet:
    """One deployment, and a record of the orders."""

    known: list[Deployment] = field(default_factory=lambda: [DEPLOYMENT])
    orders: list[tuple[Any, ...]] = field(default_factory=list)
    longest_s: float = math.inf

    def deployments(self) -> list[Deployment]:
        return self.known

    def find(self, key: ModelKey) -> Deployment:
        return find_deployment(key, self.known)

    def longest_run_s(self, _deployment: str) -> float:
        return self.longest_s

    def status(self) -> dict[str, Any]:
        return {
            each.name: {
                "deployment_level": "HOT",
                "application_state": "RUNNING",
                "model_key": each.model_key.render(),
                "repo_id": each.repo_id,
                "revision": each.revision,
                "task": each.task,
                "trust_remote_code": each.trust_remote_code,
            }
            for each in self.known
        }

    def environment(self) -> dict[str, Any]:
        return {"python_version": "3.11.9", "packages": {"torch": "2.13.0"}}

    def surroundings(self) -> list[dict[str, Any]]:
        return surroundings(self.known, [])

    def processes(self) -> list[dict[str, Any]]:
        return [{"slot": "tiny-gpt2/0", "state": "warm"}]

    async def add_deployment(self, deployment: Deployment) -> None:
        if any(each.name == deployment.name for each in self.known):
            raise Conflict(f"the name {deployment.name} is taken")
        self.known.append(deployment)

    async def remove_deployment(self, name: str, *, force: bool) -> int:
        self.orders.append(("remove", name, force))
        return 2

    async def scale(self, deployment: str, replicas: int) -> None:
        self.orders.append(("scale", deployment, replicas))

    async def limit(self, deployment: str, change: Callable[[Allowed], Allowed]) -> Deployment:
        old = next(each for each in self.known if each.name == deployment)
        new = replace(old, limits=checked(change(old.limits)))
        self.known = [new if each is old else each for each in self.known]
        return new

    async def allocate(
        self, deployment: str, *, site: str, slots: int | None, **wishes: Any
    ) -> list[dict[str, Any]]:
        said = {name: wish for name, wish in wishes.items() if wish is not None}
        self.orders.append(("allocate", deployment, site, slots, *said.items()))
        return [{"allocation": {"id": "a1"}, "join_token": "once"}]

    async def submitted(self, allocation_id: str, *, job_id: str) -> None:
        self.orders.append(("submitted", allocation_id, job_id))

    async def failed(self, allocation_id: str, *, cause: str, detail: str) -> None:
        self.orders.append(("failed", allocation_id, cause, detail))

    async def join(
        self, join_token: str, *, worker_key: str, pilot_key: str, node: str
    ) -> dict[str, Any]:
        if join_token != "once":
            raise NotAuthenticated("the join token is unknown or was used")
        self.orders.append(("join", worker_key, pilot_key))
        return {"endpoint": "tcp://relay:1", "server_key": "k" * 40, "node": node}

    async def drain(self, deployment: str | None, allocation: str | None) -> int:
        self.orders.append(("drain", deployment, allocation))
        return 1


@dataclass
class Relay:
    """A running HTTP surface and what is behind it."""

    server: Server
    loop: asyncio.AbstractEventLoop
    broker: FakeBroker
    fleet: FakeFleet
    sessions: Sessions
    blobs: BlobFolder
    objects: DirectoryStore
    signer: Signer
    clock: ManualClock
    accounts: Accounts
    model_key: str = MODEL_KEY
    blob_root: Path = Path()
    researcher: str = ""
    other: str = ""
    operator: str = ""

    @property
    def url(self) -> str:
        return self.server.url

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the relay's loop."""
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return future.result(timeout=20)

    def link(self, method: str, path: str, *, expires_in_s: float = 60.0) -> str:
        until = self.clock.wall() + expires_in_s
        return self.url + self.signer.link(method, path, expires_at=until)

    def client(self, token: str = "", *, verify: Any = True, **headers: str) -> httpx.Client:
        if token:
            headers["ndif-api-key"] = token
        told = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.Client(base_url=self.url, headers=told, timeout=20, verify=verify)

    def post(
        self,
        *,
        token: str | None = None,
        blob: bytes = b"blob",
        session: str = "",
        key: str = MODEL_KEY,
        env: dict[str, Any] | None = None,
        **headers: str,
    ) -> httpx.Response:
        """`POST /request` as nnsight does it."""
        import json

        envelope = {
            "model_key": key,
            "session_id": session,
            "compress": True,
            "env": env if env is not None else {"attn_implementation": "sdpa"},
        }
        told = {"nnsight-version": "0.8.1", "python-version": "3.11.9 (main)"} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        with self.client(self.researcher if token is None else token) as client:
            return client.post(
                "/request",
                data={"data": json.dumps(envelope)},
                files={"blob": ("request", blob, "application/octet-stream")},
                headers=told,
            )


def _start(root: Path, settings: RelaySettings, linger_s: float) -> Relay:
    clock = ManualClock()
    signer = Signer(secret=b"s" * 32)
    blobs = BlobFolder(root / "blobs")
    objects = DirectoryStore(root / "objects", signer=signer, clock=clock, part_bytes=PART_BYTES)
    writer = FakeWriter()
    accounts = Accounts(read=writer.rows.values, writer=writer, clock=clock)
    broker = FakeBroker(blobs=blobs, signer=signer, clock=clock)
    fleet, sessions = FakeFleet(), Sessions()
    deps = Deps(
        settings=settings,
        clock=clock,
        broker=broker,
        fleet=fleet,
        accounts=accounts,
        sessions=sessions,
        blobs=blobs,
        objects=objects,
        signer=signer,
        linger_s=linger_s,
    )
    return Relay(
        server=serve(build_app(deps), settings),
        loop=uvloop.new_event_loop(),
        broker=broker,
        fleet=fleet,
        sessions=sessions,
        blobs=blobs,
        objects=objects,
        signer=signer,
        clock=clock,
        accounts=accounts,
        blob_root=root / "blobs",
    )


@pytest.fixture
def start_relay(tmp_path: Path) -> Iterator[Callable[..., Relay]]:
    """Start relays, and stop them at the end."""
    running: list[tuple[Relay, threading.Thread]] = []

    def start(*, linger_s: float = 30.0, **settings: Any) -> Relay:
        root = tmp_path / str(len(running))
        chosen = RelaySettings(
            **{
                "port": 0,
                "data_dir": root,
                "max_request_bytes": LIMIT_BYTES,
                "poll_hold_s": 0.5,
                **settings,
            }
        )
        relay = _start(root, chosen, linger_s)
        thread = threading.Thread(target=_run, args=(relay,))
        thread.start()
        running.append((relay, thread))
        relay.run(relay.server.ready.wait())
        for name, role in (
            ("researcher", Role.RESEARCHER),
            ("other", Role.RESEARCHER),
            ("operator", Role.OPERATOR),
        ):
            _, text = relay.run(relay.accounts.create(name=name, role=role))
            setattr(relay, name, text)
        return relay

    yield start
    for relay, thread in running:
        with contextlib.suppress(RuntimeError):  # a test has stopped it
            relay.loop.call_soon_threadsafe(relay.server.stop)
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def relay(start_relay: Callable[..., Relay]) -> Relay:
    """A running relay with default settings."""
    return start_relay()


def _run(relay: Relay) -> None:
    with asyncio.Runner(loop_factory=lambda: relay.loop) as runner:
        runner.run(relay.server.run_until_stopped())
