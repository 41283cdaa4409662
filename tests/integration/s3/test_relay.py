"""A real relay and a worker over a real S3 server: whatever the store does, every request ends, and honestly."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from edif_hpc.errors import NotFound
from edif_hpc.objects.base import Upload
from edif_hpc.objects.s3 import S3Store
from edif_hpc.objects.signing import Signer
from edif_hpc.testing.ceph import S3Server
from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.proxy import Proxy
from edif_hpc.testing.raw_client import RawClient, Told
from edif_hpc.testing.stack import MODEL, Stack, tail
from edif_hpc.testing.wait import wait_until

MIB = 1 << 20
PREFIX = "relay/"
QUICK = {"lease_s": 10.0, "heartbeat_s": 0.5, "ws_grace_s": 2.0, "poll_hold_s": 0.2}


@dataclass(kw_only=True)
class House:
    """A stack whose relay and workers reach the store through one proxy each, and researchers directly."""

    stack: Stack
    server: S3Server
    bucket: str
    relay_way: Proxy
    worker_way: Proxy
    client: RawClient

    def result(self, end: Told) -> bytes:
        assert end.status == "COMPLETED", end
        assert str(end.data).startswith(self.server.url), (
            "researchers are given the public address"
        )
        return self.client.result(end)

    def stored(self, request_id: str, attempt: int = 1) -> int:
        """How many bytes lie in the bucket."""

        async def size(store: S3Store) -> int:
            return await store.size(f"{request_id}/{attempt}")

        return asyncio.run(self._ask(size))

    def holds(self, request_id: str) -> bool:
        """Whether the bucket has the result."""
        try:
            return self.stored(request_id) >= 0
        except NotFound:
            return False

    def upload(self, request_id: str, attempt: int = 1) -> Upload | None:
        """The upload under way."""

        async def resume(store: S3Store) -> Upload | None:
            return await store.resume(f"{request_id}/{attempt}")

        return asyncio.run(self._ask(resume))

    async def _ask(self, question):  # type: ignore[no-untyped-def]
        store = await S3Store.connect(self.server.place(self.bucket, prefix=PREFIX))
        try:
            return await question(store)
        finally:
            await store.close()


@pytest.fixture(scope="module")
def house(
    tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server, s3_bucket: str
) -> Iterator[House]:
    root = tmp_path_factory.mktemp("s3-relay")
    with Proxy(s3_server.port) as relay_way, Proxy(s3_server.port) as worker_way:
        ways = {
            "s3_prefix": PREFIX,
            "s3_endpoint": relay_way.url,
            "s3_worker_endpoint": worker_way.url,
            "s3_public_endpoint": s3_server.url,
        }
        settings = {**QUICK, **s3_server.settings(s3_bucket), **ways}
        with Stack(root=root, settings=settings, moved_clock=True) as stack:
            stack.deploy()
            stack.launch(engine="noop")
            stack.wait_warm()
            yield House(
                stack=stack, server=s3_server, bucket=s3_bucket, relay_way=relay_way,
                worker_way=worker_way, client=stack.client(),
            )  # fmt: skip


@pytest.fixture(autouse=True)
def _healed(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "house" in request.fixturenames:
        house: House = request.getfixturevalue("house")
        house.relay_way.heal()
        house.worker_way.heal()


def large(name: str, size_mib: int = 20) -> bytes:
    return Task(name=name, result_bytes=size_mib * MIB).blob()


def test_a_large_result_and_a_range_of_it(house: House) -> None:
    blob = large("whole")
    end = house.client.ended(house.client.send(blob))
    assert house.result(end) == result_of(blob)
    answer = httpx.get(str(end.data), headers={"range": "bytes=1000-1999"})
    assert (answer.status_code, answer.content) == (206, result_of(blob)[1000:2000])
    assert "content-encoding" not in answer.headers


def test_a_small_result_never_sees_the_store(house: House) -> None:
    house.relay_way.refuse()
    house.worker_way.refuse()
    blob = Task(name="small").blob()
    end = house.client.ended(house.client.send(blob))
    assert house.client.result(end) == result_of(blob)


def test_each_poll_gives_a_fresh_url(house: House) -> None:
    request_id = house.client.send(large("fresh"))
    first = str(house.client.ended(request_id).data)
    wait_until(lambda: str(house.client.poll(request_id).data) != first, 10, "a URL signed anew")


def test_the_relays_own_link_leads_there(house: House) -> None:
    blob = large("link")
    request_id = house.client.ended(house.client.send(blob)).id
    signer = Signer(secret=(house.stack.data_dir / "links.secret").read_bytes())
    link = signer.link("GET", f"/results/{request_id}", expires_at=time.time() + 60)
    answer = httpx.get(house.stack.url + link, follow_redirects=True)
    assert answer.content == result_of(blob)
    assert str(answer.url).startswith(house.server.url)


@pytest.mark.parametrize("who", ["worker", "relay"])
def test_the_store_is_away_for_a_while(house: House, who: str) -> None:
    """The relay answers meanwhile, the worker keeps the result, and nothing runs twice."""
    way = house.worker_way if who == "worker" else house.relay_way
    blob = large(f"away-{who}")
    way.refuse()
    before = way.connections
    request_id = house.client.send(blob)
    wait_until(lambda: way.connections > before + 1, 30, "the store is asked")
    assert house.client.poll(request_id).status == "RUNNING"
    way.heal()
    end = house.client.ended(request_id)
    assert house.result(end) == result_of(blob)
    assert end.meta["attempt"] == 1


def test_cut_connections(house: House) -> None:
    house.worker_way.cut_uploads(3 * MIB, times=5)
    blob = large("cut", 40)
    end = house.client.ended(house.client.send(blob))
    assert house.result(end) == result_of(blob)
    assert end.meta["attempt"] == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_relay_dies_during_an_upload(house: House, how: signal.Signals) -> None:
    house.worker_way.hang()
    blob = large(f"relay-{how.name}", 40)
    request_id = house.client.send(blob)
    wait_until(lambda: house.upload(request_id), 30, "an upload is under way")
    house.stack.kill_relay(how)
    house.stack.start_relay()
    house.worker_way.heal()
    end = house.client.ended(request_id)
    assert house.result(end) == result_of(blob)
    assert end.meta["attempt"] == 1
    assert house.upload(request_id) is None


def test_a_full_bucket_ends_in_an_honest_error(house: House) -> None:
    house.stack.stop_relay()
    house.stack.start_relay(store_patience_s=1.0)
    house.server.limit(1)
    try:
        end = house.client.ended(house.client.send(large("full")))
    finally:
        house.server.limit(None)
        house.stack.stop_relay()
        house.stack.start_relay()
    assert (end.status, end.kind) == ("ERROR", "engine")
    assert "QuotaExceeded" in end.description
    assert "the code has run" in end.description
    assert house.upload(end.id) is None, "what was up of it is thrown away"
    blob = large("after")
    assert house.result(house.client.ended(house.client.send(blob))) == result_of(blob)


def test_a_cancelled_upload_is_aborted(house: House) -> None:
    house.worker_way.hang()
    request_id = house.client.send(large("cancel", 40))
    wait_until(lambda: house.upload(request_id), 30, "an upload is under way")
    house.stack.operator.call("DELETE", f"/requests/{request_id}")
    wait_until(lambda: house.upload(request_id) is None, 30, "it is aborted")
    assert house.client.ended(request_id).kind == "cancelled"


def test_retention_empties_the_bucket(house: House) -> None:
    request_id = house.client.send(large("old"))
    house.client.ended(request_id)
    assert house.stored(request_id) == 20 * MIB
    house.stack.stop_relay()
    house.stack.clock_file.write_text(str(8 * 24 * 3600))
    try:
        house.stack.start_relay()
        end = wait_until(lambda: gone(house.client.poll(request_id)), 30, "it is marked deleted")
        wait_until(lambda: not house.holds(request_id), 30, "its bytes are deleted")
    finally:
        house.stack.stop_relay()
        house.stack.clock_file.write_text("0")
        house.stack.start_relay()
    assert end is not None
    assert end.kind == "expired"


def gone(now: Told) -> Told | None:
    return now if now.status == "ERROR" else None


# -- the start -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ({"s3_bucket": "no-such-bucket"}, "make the bucket"),
        ({"s3_secret_key": "wrong"}, "s3_secret_key"),
        ({"s3_access_key": "NOBODY"}, "s3_access_key"),
    ],
)
def test_a_relay_does_not_start_with_a_bucket_that_cannot_work(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str, wrong: dict[str, str], hint: str
) -> None:
    with Stack(root=tmp_path) as stack:
        stack.stop_relay()
        stack.spawn_relay(**(s3_server.settings(s3_bucket) | wrong))
        assert stack.wait_relay() != 0
        said = tail(tmp_path / "relay.log")
        assert hint in said
        assert "wrong" not in said, "a secret is never shown"
        stack.start_relay()


def test_a_relay_starts_while_its_store_is_away(
    tmp_path: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    with Proxy(s3_server.port) as way:
        way.refuse()
        settings = {**s3_server.settings(s3_bucket), "s3_endpoint": way.url}
        with Stack(root=tmp_path, settings=settings) as stack:
            assert "object_store_away" in tail(tmp_path / "relay.log")
            stack.deploy()
            stack.client().send(b"anything")


# -- with everything real --------------------------------------------------------------------------


def test_an_unmodified_nnsight_client(
    tmp_path: Path, tiny_gpt2: Path, s3_server: S3Server, s3_bucket: str
) -> None:
    """A result of 100 MB, compressed and raw, equal to a local run."""
    settings = {**QUICK, **s3_server.settings(s3_bucket)}
    with Stack(root=tmp_path, models={MODEL: tiny_gpt2}, settings=settings) as stack:
        stack.deploy()
        stack.launch()
        stack.wait_warm()
        with ClientProcess(stack.client_environ(stack.token("ada")), tmp_path / "ada") as client:
            client.run(f"""
                from nnsight import CONFIG, TransformersModel
                import torch
                model = TransformersModel({MODEL!r}, task="text-generation")
                local = TransformersModel({MODEL!r}, task="text-generation", dispatch=True)
            """)
            for compress in (True, False):
                told = client.run(f"""
                    CONFIG.API.COMPRESS = {compress}
                    with model.trace("hello", remote=True) as tracer:
                        logits = model.lm_head.output.save()
                        big = torch.arange(25_000_000).to(torch.float32).save()
                    with local.trace("hello"):
                        same = local.lm_head.output.save()
                    report(
                        equal=torch.equal(logits, same),
                        whole=torch.equal(big, torch.arange(25_000_000).to(torch.float32)),
                    )
                """)
                assert (told["equal"], told["whole"]) == (True, True), f"compress={compress}"
