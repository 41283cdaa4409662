"""The contract of `objects.base.ObjectStore`, over the directory and over a bucket of a real S3 server.

Bytes go as workers and researchers send and fetch them: by the signed URLs, with a plain HTTP client.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette

from edif_hpc.errors import EdifError, InvalidInput, NotFound
from edif_hpc.objects.base import ObjectStore, Upload, UploadedPart
from edif_hpc.objects.directory import DirectoryStore
from edif_hpc.objects.s3 import S3Store
from edif_hpc.objects.signing import Signer
from edif_hpc.relay.answers import refusal
from edif_hpc.relay.files import Parts, check_link
from edif_hpc.testing.ceph import S3Server
from edif_hpc.testing.clock import ManualClock

DAY_S = 24 * 3600.0
BASE = "http://relay.example"


@dataclass
class Room:
    """A store, the client that reaches it, and what tests do around it."""

    store: ObjectStore
    http: httpx.AsyncClient
    again: Callable[[], Awaitable[ObjectStore]]  #: the store of a relay that was started anew
    brief: Callable[
        [], Awaitable[ObjectStore]
    ]  #: the same store, whose URLs are valid for a moment
    expire: Callable[[], None]  #: let that moment pass, where time is ours

    async def put(self, upload: Upload, pieces: list[bytes], first: int = 1) -> list[UploadedPart]:
        """Put pieces as the parts `first`, …."""
        urls = await self.store.part_urls(upload, first, len(pieces), base_url=BASE)
        parts = []
        for number, (url, piece) in enumerate(zip(urls, pieces, strict=True), start=first):
            answer = await self.http.put(url, content=piece)
            assert answer.status_code == 200, answer.text
            parts.append(UploadedPart(number=number, etag=answer.headers["etag"].strip('"')))
        return parts

    async def keep(self, key: str, data: bytes) -> None:
        """Store bytes under a key."""
        upload = await self.store.begin(key)
        await self.store.complete(upload, await self.put(upload, self.pieces(data)), len(data))

    async def get(self, key: str, **headers: str) -> httpx.Response:
        """Fetch an object as a researcher does."""
        url = await self.store.read_url(key, base_url=BASE)
        return await self.http.get(url, headers=headers)

    def pieces(self, data: bytes) -> list[bytes]:
        """The bytes as parts."""
        size = self.store.part_bytes
        return [data[start : start + size] for start in range(0, len(data), size)]


def directory_app(store: DirectoryStore, signer: Signer, clock: ManualClock) -> Starlette:
    """The routes of the relay behind a directory store's URLs."""

    async def on_refusal(_: object, error: Exception) -> object:
        assert isinstance(error, EdifError)
        return refusal(error)

    parts = Parts(store, lambda http, method: check_link(signer, http, method, clock.wall()))
    return Starlette(routes=parts.routes(), exception_handlers={EdifError: on_refusal})  # type: ignore[dict-item]


async def directory_room(root: Path) -> AsyncIterator[Room]:
    clock, signer = ManualClock(), Signer(secret=b"s" * 32)

    async def store() -> DirectoryStore:
        return DirectoryStore(root, signer=signer, clock=clock)

    made = await store()
    transport = httpx.ASGITransport(app=directory_app(made, signer, clock))
    async with httpx.AsyncClient(transport=transport) as http:
        yield Room(
            store=made, http=http, again=store, brief=store, expire=lambda: clock.advance(2 * 3600)
        )


async def s3_room(server: S3Server, bucket: str) -> AsyncIterator[Room]:
    place = server.place(bucket, prefix=f"{secrets.token_hex(4)}/")
    opened: list[S3Store] = []

    async def store(link_s: float = 60.0) -> S3Store:
        opened.append(await S3Store.connect(replace(place, link_s=link_s)))
        return opened[-1]

    async with httpx.AsyncClient(timeout=30) as http:
        yield Room(
            store=await store(),
            http=http,
            again=store,
            brief=lambda: store(1.0),
            expire=lambda: None,
        )
    for each in opened:
        await each.close()


@pytest.fixture(params=["directory", "s3"])
def rooms(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Room]:
    """One room, of each implementation in turn; not async, as starting a server is not."""
    if request.param == "directory":
        return directory_room(tmp_path)
    server: S3Server = request.getfixturevalue("s3_server")
    return s3_room(server, request.getfixturevalue("s3_bucket"))


@pytest.fixture
async def room(rooms: AsyncIterator[Room]) -> AsyncIterator[Room]:
    """A store and what is around it."""
    async for each in rooms:
        yield each


async def refused(http: httpx.AsyncClient, method: str, url: str) -> httpx.Response:
    """The answer of a URL once it is refused; it may have a moment of life left."""
    deadline = time.monotonic() + 20
    while True:
        answer = await http.request(method, url, content=b"x" if method == "PUT" else None)
        if answer.status_code >= 400:
            return answer
        assert time.monotonic() < deadline, f"{url} is still served"
        await asyncio.sleep(0.05)


# -- up and down -----------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_a_result_in_parts_comes_back_whole(room: Room, extra: int) -> None:
    data = os.urandom(2 * room.store.part_bytes + extra)
    await room.keep("r1/1", data)
    assert await room.store.size("r1/1") == len(data)
    answer = await room.get("r1/1")
    assert answer.content == data
    assert int(answer.headers["content-length"]) == len(data)
    assert "content-encoding" not in answer.headers


async def test_a_result_of_one_short_part(room: Room) -> None:
    await room.keep("r1/1", b"short")
    assert (await room.get("r1/1")).content == b"short"


async def test_parts_in_any_order_and_twice(room: Room) -> None:
    """A part whose answer was lost is put again."""
    first, second = os.urandom(room.store.part_bytes), os.urandom(1000)
    upload = await room.store.begin("r1/1")
    late = await room.put(upload, [second], first=2)
    await room.put(upload, [bytes(room.store.part_bytes)])
    early = await room.put(upload, [first])
    await room.store.complete(upload, [*early, *late], len(first) + len(second))
    assert (await room.get("r1/1")).content == first + second


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [("bytes=10-99", 10, 100), ("bytes=1000-", 1000, 1024), ("bytes=-24", 1000, 1024)],
)
async def test_a_range(room: Room, asked: str, start: int, stop: int) -> None:
    data = os.urandom(1024)
    await room.keep("r1/1", data)
    answer = await room.get("r1/1", range=asked)
    assert answer.status_code == 206
    assert answer.content == data[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/1024"


async def test_many_at_once(room: Room) -> None:
    wanted = {f"r{each}/1": os.urandom(1000 + each) for each in range(8)}
    await asyncio.gather(*(room.keep(key, data) for key, data in wanted.items()))
    for key, data in wanted.items():
        assert (await room.get(key)).content == data


async def test_attempts_do_not_mix(room: Room) -> None:
    old, new = await room.store.begin("r1/1"), await room.store.begin("r1/2")
    old_parts, new_parts = await room.put(old, [b"old one"]), await room.put(new, [b"new"])
    await room.store.complete(new, new_parts, 3)
    await room.store.complete(old, old_parts, 7)
    assert (await room.get("r1/2")).content == b"new"
    assert (await room.get("r1/1")).content == b"old one"


# -- completing ------------------------------------------------------------------------------------


async def test_nothing_is_there_before_it_is_complete(room: Room) -> None:
    upload = await room.store.begin("r1/1")
    await room.put(upload, [b"data"])
    with pytest.raises(NotFound):
        await room.store.size("r1/1")
    with pytest.raises(NotFound):
        await room.store.read_url("r1/1", base_url=BASE)


async def test_complete_twice(room: Room) -> None:
    """The relay may die after it, before it is recorded."""
    upload = await room.store.begin("r1/1")
    parts = await room.put(upload, [b"data"])
    await room.store.complete(upload, parts, 4)
    await room.store.complete(upload, parts, 4)
    assert (await room.get("r1/1")).content == b"data"


@pytest.mark.parametrize("told", [3, 5])
async def test_a_wrong_size_is_no_result(room: Room, told: int) -> None:
    upload = await room.store.begin("r1/1")
    parts = await room.put(upload, [b"data"])
    with pytest.raises(InvalidInput):
        await room.store.complete(upload, parts, told)
    with pytest.raises(NotFound):
        await room.store.size("r1/1")


async def test_a_missing_part_is_no_result(room: Room) -> None:
    size = 2 * room.store.part_bytes
    upload = await room.store.begin("r1/1")
    parts = await room.put(upload, [bytes(room.store.part_bytes)])
    told = [*parts, UploadedPart(number=2, etag=parts[0].etag)]
    with pytest.raises(InvalidInput):
        await room.store.complete(upload, told, size)
    with pytest.raises(NotFound):
        await room.store.size("r1/1")


# -- aborting, and a relay that is started anew ----------------------------------------------------


async def test_an_aborted_upload_is_over(room: Room) -> None:
    upload = await room.store.begin("r1/1")
    [url] = await room.store.part_urls(upload, 1, 1, base_url=BASE)
    parts = await room.put(upload, [b"data"])
    await room.store.abort(upload)
    await room.store.abort(upload)
    assert (await room.http.put(url, content=b"late")).status_code == 404
    with pytest.raises(NotFound):
        await room.store.complete(upload, parts, 4)


async def test_an_upload_outlives_the_relay(room: Room) -> None:
    first, second = os.urandom(room.store.part_bytes), b"the rest"
    upload = await room.store.begin("r1/1")
    early = await room.put(upload, [first])

    room.store = await room.again()
    found = await room.store.resume("r1/1")
    assert found is not None
    late = await room.put(found, [second], first=2)
    await room.store.complete(found, [*early, *late], len(first) + len(second))
    assert (await room.get("r1/1")).content == first + second
    assert await room.store.resume("r1/1") is None


async def test_there_is_nothing_to_resume(room: Room) -> None:
    await room.store.begin("r1/10")
    assert await room.store.resume("r1/1") is None
    aborted = await room.store.begin("r2/1")
    await room.store.abort(aborted)
    assert await room.store.resume("r2/1") is None


# -- URLs ------------------------------------------------------------------------------------------


async def test_a_url_is_good_for_one_thing(room: Room) -> None:
    await room.keep("r1/1", b"data")
    await room.keep("r1/2", b"data")
    upload = await room.store.begin("r3/1")
    [put] = await room.store.part_urls(upload, 1, 1, base_url=BASE)
    get = await room.store.read_url("r1/1", base_url=BASE)
    tampered = [
        ("GET", get.replace("r1/1", "r1/2")),
        ("PUT", get),
        ("DELETE", get),
        ("PUT", put.replace("partNumber=1", "partNumber=2").replace("/1?", "/2?")),
        ("GET", get.split("?", maxsplit=1)[0]),
    ]
    for method, url in tampered:
        answer = await room.http.request(method, url)
        assert answer.status_code in (403, 405), (method, url, answer.text)
    assert (await room.http.get(get)).content == b"data"


async def test_urls_expire(room: Room) -> None:
    await room.keep("r1/1", b"data")
    room.store = await room.brief()
    upload = await room.store.begin("r2/1")
    [put] = await room.store.part_urls(upload, 1, 1, base_url=BASE)
    get = await room.store.read_url("r1/1", base_url=BASE)
    room.expire()
    assert (await refused(room.http, "GET", get)).status_code == 403
    assert (await refused(room.http, "PUT", put)).status_code == 403
    assert (await room.get("r1/1")).content == b"data", "a renewed URL works"


@pytest.mark.parametrize(
    "key", ["", "/", "../x", "a/../b", "a//b", "a/.", "a b", "a?b", "a#b", "é", "a" * 200]
)
async def test_odd_keys_are_refused(room: Room, key: str) -> None:
    with pytest.raises(InvalidInput):
        await room.store.begin(key)
    with pytest.raises(InvalidInput):
        await room.store.read_url(key, base_url=BASE)
    with pytest.raises(InvalidInput):
        await room.store.delete(key)


# -- deleting --------------------------------------------------------------------------------------


async def test_delete_takes_all_attempts_and_no_neighbour(room: Room) -> None:
    for key in ("r1/1", "r1/2", "r10/1"):
        await room.keep(key, b"data")
    await room.store.delete("r1")
    await room.store.delete("r1")
    await room.store.delete("r2")
    for key in ("r1/1", "r1/2"):
        with pytest.raises(NotFound):
            await room.store.size(key)
    assert await room.store.size("r10/1") == 4


async def test_sweep_takes_what_is_old(room: Room) -> None:
    await room.keep("r1/1", b"data")
    await room.store.begin("r2/1")
    now = time.time()
    assert await room.store.sweep(objects_before=now - DAY_S, uploads_before=now - DAY_S) == 0
    assert await room.store.size("r1/1") == 4

    assert await room.store.sweep(objects_before=now - DAY_S, uploads_before=now + DAY_S) == 1
    assert await room.store.resume("r2/1") is None
    assert await room.store.size("r1/1") == 4

    assert await room.store.sweep(objects_before=now + DAY_S, uploads_before=now - DAY_S) == 1
    with pytest.raises(NotFound):
        await room.store.size("r1/1")
