"""Faults between a worker and a real S3 server: the result arrives whole, or its error says why."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import httpx
import pytest

from edif_hpc.domain.request import Failure, FailureKind
from edif_hpc.errors import NotFound, Unavailable
from edif_hpc.objects.s3 import LOOK_S
from edif_hpc.relay.board import Open
from edif_hpc.testing.ceph import S3Server
from edif_hpc.testing.clock import ManualClock
from edif_hpc.testing.proxy import Proxy
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire import messages as m
from edif_hpc.worker.transfer import Transfer
from edif_hpc.worker.uploading import IN_FLIGHT, StoreGivenUp

if TYPE_CHECKING:
    from conftest import MakeWay, Way

MIB = 1 << 20


async def arrives(way: Way, data: bytes, done: m.Done) -> None:
    assert await way.sealing.seal(way.entry, done) is None
    assert await way.fetch() == data


async def test_three_names_of_one_store(
    make_way: MakeWay, s3_server: S3Server, proxy: Proxy
) -> None:
    """The relay, the workers and the researchers each reach the store by their own address."""
    with Proxy(s3_server.port) as public:
        way = await make_way(worker_endpoint=proxy.url, public_endpoint=public.url)
        data = way.write(20 * MIB)
        await arrives(way, data, await way.send())
        assert proxy.uploaded > 20 * MIB
        assert public.connections == 1
        url = await way.store.read_url(f"{way.entry.request.id}/1", base_url="")
        assert url.startswith(public.url)
        other_name = url.replace(public.url, s3_server.url)
    assert await status_of(other_name) == 403, "a URL is signed for the address that it names"


async def test_parts_go_up_while_the_file_grows(make_way: MakeWay, proxy: Proxy) -> None:
    way = await make_way(worker_endpoint=proxy.url)
    data = way.write(2 * way.parts + 1000)
    uploading = way.uploading()
    uploading.grew(way.source, way.parts - 1)
    uploading.grew(way.source, 2 * way.parts)
    await wait_until_async(lambda: proxy.uploaded > 2 * way.parts, 20, "two parts are up")
    assert proxy.uploaded < 2 * way.parts + 10_000
    parts = await uploading.finish(way.source, len(data))
    assert [each.number for each in parts] == [1, 2, 3]
    done = m.Done(request=way.entry.request.id, attempt=1, size=len(data), parts=parts)
    await arrives(way, data, done)


async def test_few_parts_are_in_memory(make_way: MakeWay, proxy: Proxy) -> None:
    way = await make_way(worker_endpoint=proxy.url)
    way.write(10 * way.parts)
    proxy.hang()
    sending = asyncio.create_task(way.send())
    await wait_until_async(lambda: proxy.connections == IN_FLIGHT, 20, "parts are on their way")
    proxy.heal()
    await sending
    assert proxy.connections == IN_FLIGHT


@pytest.mark.parametrize("fault", ["cut", "refused", "slow", "hanging"])
async def test_a_fault_that_passes(make_way: MakeWay, proxy: Proxy, fault: str) -> None:
    way = await make_way(worker_endpoint=proxy.url)
    data = way.write(5 * way.parts)
    {
        "cut": lambda: proxy.cut_uploads(3 * MIB, times=6),
        "refused": proxy.refuse,
        "slow": lambda: setattr(proxy, "upload_bytes_per_s", 8 * MIB),
        "hanging": proxy.hang,
    }[fault]()
    sending = asyncio.create_task(way.send())
    await wait_until_async(
        lambda: proxy.connections > IN_FLIGHT or fault == "slow", 30, "it tries again"
    )
    if fault != "slow":
        proxy.heal()
    await arrives(way, data, await sending)


async def test_a_connection_cut_during_the_growth(make_way: MakeWay, proxy: Proxy) -> None:
    way = await make_way(worker_endpoint=proxy.url)
    data = way.write(3 * way.parts)
    uploading = way.uploading()
    proxy.refuse()
    uploading.grew(way.source, way.parts)
    await wait_until_async(lambda: proxy.connections >= 2, 20, "it tries again")
    proxy.heal()
    parts = await uploading.finish(way.source, len(data))
    done = m.Done(request=way.entry.request.id, attempt=1, size=len(data), parts=parts)
    await arrives(way, data, done)


async def test_expired_urls_are_renewed(make_way: MakeWay) -> None:
    """The first URLs expire while the executor computes on."""
    way = await make_way(link_s=1.0)
    data = way.write(3 * way.parts)
    uploading = way.uploading()
    uploading.grew(way.source, way.parts)
    await wait_until_async(lambda: len(way.asked) == 1, 20, "URLs were asked for")
    need = m.Need(request=way.entry.request.id, attempt=1, first=3, count=1)
    like_the_last = (await way.sealing.urls(way.entry, need, "")).urls[0]
    while await status_of(like_the_last, put=b"x") != 403:
        pass
    parts = await uploading.finish(way.source, len(data))
    asked = sorted((each.first, each.count) for each in way.asked[1:])  # they go up side by side
    assert asked == [(2, 1), (3, 1)]
    done = m.Done(request=way.entry.request.id, attempt=1, size=len(data), parts=parts)
    await arrives(way, data, done)


async def test_a_full_bucket_that_is_given_room(make_way: MakeWay, s3_server: S3Server) -> None:
    way = await make_way()
    data = way.write(3 * way.parts)
    s3_server.limit(1)
    try:
        sending = asyncio.create_task(way.send())
        await wait_until_async(lambda: len(way.asked) > 3, 30, "it tries again")
    finally:
        s3_server.limit(None)
    await arrives(way, data, await sending)


async def test_a_bucket_that_stays_full(make_way: MakeWay, s3_server: S3Server) -> None:
    way = await make_way(patience_s=1.0)
    way.write(3 * way.parts)
    s3_server.limit(1)
    try:
        with pytest.raises(StoreGivenUp) as given_up:
            await way.send()
    finally:
        s3_server.limit(None)
    assert "QuotaExceeded" in str(given_up.value)
    assert s3_server.url in str(given_up.value)


async def test_a_store_that_stays_away(make_way: MakeWay, proxy: Proxy) -> None:
    way = await make_way(worker_endpoint=proxy.url, patience_s=1.0)
    way.write(way.parts)
    proxy.refuse()
    with pytest.raises(StoreGivenUp) as given_up:
        await way.send()
    assert proxy.url in str(given_up.value)


async def test_a_relay_that_is_away_costs_no_patience(make_way: MakeWay, proxy: Proxy) -> None:
    """The store fails, the relay goes and comes back, the store fails again: not much patience is spent."""
    clock = ManualClock()
    way = await make_way(worker_endpoint=proxy.url, clock=clock)
    data = way.write(100)
    sealing, asked, answer = way.sealing, asyncio.Event(), asyncio.Event()

    class Away:
        async def urls(self, entry: Open, need: m.Need, base_url: str) -> m.Parts:
            if len(way.asked) == 2:
                asked.set()
                await answer.wait()
            return await sealing.urls(entry, need, base_url)

    way.sealing = Away()  # type: ignore[assignment]
    proxy.cut_uploads(0, times=2)
    sending = asyncio.create_task(way.send())
    await asked.wait()
    clock.advance(100 * way.patience_s)
    answer.set()
    done = await sending
    way.sealing = sealing
    await arrives(way, data, done)


async def test_the_relay_cannot_reach_the_store(
    make_way: MakeWay, proxy: Proxy, s3_server: S3Server
) -> None:
    """It answers all the same: workers with the reason, researchers with a URL."""
    way = await make_way(
        endpoint=proxy.url, worker_endpoint=s3_server.url, public_endpoint=s3_server.url
    )
    data = way.write(100)
    await arrives(way, data, await way.send())
    proxy.refuse()
    assert await way.fetch() == data
    way.entry.upload = None
    need = m.Need(request=way.entry.request.id, attempt=1, first=1, count=1)
    refused = await way.sealing.urls(way.entry, need, "")
    assert refused.urls == []
    assert proxy.url in refused.refusal


async def test_a_store_that_hangs_holds_up_no_poll(
    make_way: MakeWay, proxy: Proxy, s3_server: S3Server
) -> None:
    way = await make_way(
        endpoint=proxy.url, worker_endpoint=s3_server.url, public_endpoint=s3_server.url
    )
    data = way.write(100)
    await arrives(way, data, await way.send())
    proxy.hang()
    async with asyncio.timeout(LOOK_S + 5):
        assert await way.fetch() == data


# -- sealing ---------------------------------------------------------------------------------------


async def test_done_is_repeated_until_the_store_is_back(
    make_way: MakeWay, proxy: Proxy, s3_server: S3Server
) -> None:
    way = await make_way(
        endpoint=proxy.url, worker_endpoint=s3_server.url, public_endpoint=s3_server.url
    )
    data = way.write(3 * way.parts)
    done = await way.send()
    proxy.refuse()
    with pytest.raises(Unavailable):
        await way.sealing.seal(way.entry, done)
    proxy.heal()
    await arrives(way, data, done)


async def test_a_store_that_never_seals(
    make_way: MakeWay, proxy: Proxy, s3_server: S3Server
) -> None:
    clock = ManualClock()
    way = await make_way(endpoint=proxy.url, worker_endpoint=s3_server.url, clock=clock)
    way.write(100)
    done = await way.send()
    proxy.refuse()
    with pytest.raises(Unavailable):
        await way.sealing.seal(way.entry, done)
    clock.advance(way.patience_s + 1)
    end = await way.sealing.seal(way.entry, done)
    assert isinstance(end, Failure)
    assert end.kind is FailureKind.ENGINE
    assert proxy.url in end.message


async def test_the_relay_is_started_anew_between_the_parts(make_way: MakeWay) -> None:
    """Parts that are up are not sent again."""
    way = await make_way()
    data = way.write(20 * way.parts)
    uploading = way.uploading()
    uploading.grew(way.source, 16 * way.parts)
    await wait_until_async(lambda: len(uploading._etags) == 16, 60, "the first parts are up")
    await way.relay()
    parts = await uploading.finish(way.source, len(data))
    assert [each.first for each in way.asked] == [1, 17]
    done = m.Done(request=way.entry.request.id, attempt=1, size=len(data), parts=parts)
    await arrives(way, data, done)


async def test_the_relay_is_started_anew_before_the_seal(make_way: MakeWay) -> None:
    way = await make_way()
    data = way.write(3 * way.parts)
    done = await way.send()
    await way.relay()
    await arrives(way, data, done)


async def test_the_relay_is_started_anew_after_the_seal(make_way: MakeWay) -> None:
    way = await make_way()
    data = way.write(100)
    done = await way.send()
    assert await way.sealing.seal(way.entry, done) is None
    await way.relay()
    await arrives(way, data, done)


async def test_a_lost_upload_is_put_again(make_way: MakeWay) -> None:
    way = await make_way()
    data = way.write(3 * way.parts)
    done = await way.send()
    upload = await way.store.resume(f"{way.entry.request.id}/1")
    assert upload is not None
    await way.store.abort(upload)
    again = await way.sealing.seal(way.entry, done)
    assert again == m.Reupload(request=way.entry.request.id, attempt=1)
    await arrives(way, data, await way.send())


async def test_a_result_that_is_shorter_than_was_said(make_way: MakeWay) -> None:
    way = await make_way()
    data = way.write(3 * way.parts)
    done = await way.send()
    wrong = m.Done(request=done.request, attempt=1, size=done.size + 1, parts=done.parts)
    assert isinstance(await way.sealing.seal(way.entry, wrong), m.Reupload)
    with pytest.raises(NotFound):
        await way.store.size(f"{way.entry.request.id}/1")
    await arrives(way, data, await way.send())


async def test_the_upload_of_an_attempt_that_is_over_is_aborted(make_way: MakeWay) -> None:
    way = await make_way()
    first = m.Need(request=way.entry.request.id, attempt=1, first=1, count=1)
    await way.sealing.urls(way.entry, first, "")
    second = m.Need(request=way.entry.request.id, attempt=2, first=1, count=1)
    await way.sealing.urls(way.entry, second, "")
    assert await way.store.resume(f"{way.entry.request.id}/1") is None
    assert await way.store.resume(f"{way.entry.request.id}/2") is not None


async def test_two_questions_begin_one_upload(make_way: MakeWay) -> None:
    way = await make_way()
    need = m.Need(request=way.entry.request.id, attempt=1, first=1, count=1)
    answers = await asyncio.gather(*(way.sealing.urls(way.entry, need, "") for _ in range(5)))
    handles = {httpx.URL(each.urls[0]).params["uploadId"] for each in answers}
    assert len(handles) == 1


async def test_a_shared_bucket(make_way: MakeWay) -> None:
    """What lies outside the prefix belongs to others, however old it is."""
    ours, theirs = await make_way(), await make_way()
    data = theirs.write(100)
    await arrives(theirs, data, await theirs.send())
    await theirs.store.begin("their/upload")
    future = time.time() + 1e6
    assert await ours.store.sweep(objects_before=future, uploads_before=future) == 0
    assert await theirs.fetch() == data
    assert await theirs.store.resume("their/upload") is not None


async def test_stopping_leaves_nothing_running(make_way: MakeWay, proxy: Proxy) -> None:
    way = await make_way(worker_endpoint=proxy.url)
    way.write(5 * way.parts)
    uploading = way.uploading()
    proxy.hang()
    uploading.grew(way.source, 5 * way.parts)
    await wait_until_async(lambda: proxy.connections == IN_FLIGHT, 20, "parts are on their way")
    async with asyncio.timeout(5):
        await uploading.stop()
    assert not [each for each in asyncio.all_tasks() if each.get_name().startswith("upload-")]


async def test_a_refusal_says_what_the_store_said(make_way: MakeWay) -> None:
    way = await make_way()
    transfer = Transfer()

    async def body() -> AsyncIterator[bytes]:
        yield b"data"

    nowhere = f"{way.place.endpoint}/no-such-bucket/x?partNumber=1&uploadId=y"
    with pytest.raises(Unavailable, match=r"HTTP 404 .*NoSuchBucket"):
        await transfer.put(nowhere, body(), 4)
    await transfer.close()


async def status_of(url: str, put: bytes | None = None) -> int:
    """What the store answers."""
    async with httpx.AsyncClient(timeout=10) as http:
        answer = await (http.get(url) if put is None else http.put(url, content=put))
    return answer.status_code
