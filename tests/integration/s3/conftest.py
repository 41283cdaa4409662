"""A result's whole way, from a worker's file through the relay's sealing into a bucket, with a proxy to break it on."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import pytest

from edif_hpc.clock import Clock, SystemClock
from edif_hpc.domain.request import Limits, Request, RequestState
from edif_hpc.objects.s3 import Place, S3Store
from edif_hpc.relay.board import Open
from edif_hpc.relay.sealing import Sealing
from edif_hpc.testing.ceph import S3Server
from edif_hpc.testing.proxy import Proxy
from edif_hpc.wire import messages as m
from edif_hpc.worker.transfer import Transfer
from edif_hpc.worker.uploading import Uploading, UploadRules

ATTEMPT = 1


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    """Between whoever is told its address and the store."""
    with Proxy(s3_server.port) as running:
        yield running


@dataclass(kw_only=True)
class Way:
    """One request's result on its way; `relay()` starts the relay's part of it anew."""

    place: Place
    folder: Path
    patience_s: float
    clock: Clock
    store: S3Store
    entry: Open
    sealing: Sealing
    transfer: Transfer
    asked: list[m.Need] = field(default_factory=list)
    relay: Callable[[], Awaitable[None]]

    @property
    def source(self) -> Path:
        """The worker's file."""
        return self.folder / "result"

    @property
    def parts(self) -> int:
        """How long a part is."""
        return self.store.part_bytes

    def write(self, size_bytes: int) -> bytes:
        """Have a result of so many bytes."""
        data = os.urandom(size_bytes)
        self.source.write_bytes(data)
        return data

    def uploading(self) -> Uploading:
        """The worker's part of it."""

        async def ask(first: int, count: int) -> m.Parts:
            need = m.Need(request=self.entry.request.id, attempt=ATTEMPT, first=first, count=count)
            self.asked.append(need)
            return await self.sealing.urls(self.entry, need, "")

        rules = UploadRules(part_bytes=self.parts, patience_s=self.patience_s)
        return Uploading(transfer=self.transfer, ask=ask, rules=rules, clock=self.clock)

    async def send(self) -> m.Done:
        """Bring the whole file up; returns what the worker says then."""
        size = self.source.stat().st_size
        async with asyncio.timeout(60):
            parts = await self.uploading().finish(self.source, size)
        return m.Done(request=self.entry.request.id, attempt=ATTEMPT, size=size, parts=parts)

    async def fetch(self) -> bytes:
        """What the researcher gets."""
        url = await self.store.read_url(f"{self.entry.request.id}/{ATTEMPT}", base_url="")
        async with httpx.AsyncClient(timeout=60) as http:
            answer = await http.get(url)
        answer.raise_for_status()
        return answer.content


MakeWay = Callable[..., Awaitable[Way]]


@pytest.fixture
async def make_way(s3_server: S3Server, s3_bucket: str, tmp_path: Path) -> AsyncIterator[MakeWay]:
    """Make a way; keywords are of `Place`, and `patience_s` and `clock`."""
    async with AsyncExitStack() as stack:

        async def make(
            *, patience_s: float = 30.0, clock: Clock | None = None, **facts: object
        ) -> Way:
            used = clock or SystemClock()
            place = replace(s3_server.place(s3_bucket, prefix=f"{secrets.token_hex(4)}/"), **facts)  # type: ignore[arg-type]

            async def connect() -> S3Store:
                store = await S3Store.connect(place)
                stack.push_async_callback(store.close)
                return store

            async def relay() -> None:
                way.store = await connect()
                way.entry = Open(request=way.entry.request)
                way.sealing = Sealing(objects=way.store, clock=used, patience_s=patience_s)

            store = await connect()
            transfer = Transfer(httpx.Timeout(2.0))
            stack.push_async_callback(transfer.close)
            way = Way(
                place=place,
                folder=tmp_path,
                patience_s=patience_s,
                clock=used,
                store=store,
                entry=Open(request=request_of(secrets.token_hex(16))),
                sealing=Sealing(objects=store, clock=used, patience_s=patience_s),
                transfer=transfer,
                relay=relay,
            )
            return way

        yield make


def request_of(request_id: str) -> Request:
    """A request as it is while it runs."""
    return Request(
        id=request_id, seq=1, owner="ada", deployment="tiny", model_key="", compress=False, env={},
        blob_bytes=1, blob_sha256="", limits=Limits(), accepted_at=0.0, expires_at=1e9, keep=False,
        client={}, state=RequestState.RUNNING, attempt=ATTEMPT, crashes=0, holder="key",
    )  # fmt: skip
