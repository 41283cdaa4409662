"""Keys on disk, and a reader that misses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import stat
import time
from pathlib import Path

import pytest

from edif_hpc.errors import SettingsError
from edif_hpc.testing.wait import wait_until_async
from edif_hpc.wire.sockets import Dealer, Incoming, KeyPair, Router

WAIT_S = 20.0


def test_a_key_pair_is_kept_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o644)
    keys = KeyPair.generate()
    keys.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert KeyPair.load(path) == keys
    path.chmod(0o640)
    with pytest.raises(SettingsError, match="chmod 600"):
        KeyPair.load(path)


def test_another_file_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_text("short")
    with pytest.raises(SettingsError, match="not a key file"):
        KeyPair.load(path)


async def test_an_address_that_is_taken_or_wrong() -> None:
    keys = KeyPair.generate()
    router = Router(bind="tcp://127.0.0.1:*", keys=keys, known=bool, on_batch=len)
    with pytest.raises(SettingsError, match="choose another address"):
        Router(bind=router.endpoint, keys=keys, known=bool, on_batch=len)
    router.close()
    with pytest.raises(SettingsError, match="tcp://HOST:PORT"):
        Dealer(endpoint="nowhere", server_key=keys.public, keys=keys, on_batch=len, on_event=print)


async def test_a_handler_that_fails_loses_only_its_batch() -> None:
    """What lies behind a failed batch has announced itself before, and will not do so again."""
    loop = asyncio.get_running_loop()
    usual = loop.get_exception_handler()
    loop.set_exception_handler(lambda *_: None)  # it would fail the test
    keys, own = KeyPair.generate(), KeyPair.generate()
    batches: list[int] = []

    def handle(batch: list[Incoming]) -> None:
        batches.append(len(batch))
        if len(batches) == 2:
            raise RuntimeError("a mistake of ours")

    router = Router(bind="tcp://127.0.0.1:*", keys=keys, known=bool, on_batch=handle)
    dealer = Dealer(
        endpoint=router.endpoint,
        server_key=keys.public,
        keys=own,
        on_batch=len,
        on_event=lambda *_: None,
    )
    dealer.send(b"first")
    await wait_until_async(lambda: batches, WAIT_S, "the connection stands")
    for _ in range(2000):
        dealer.send(b"x")
    time.sleep(0.2)  # noqa: ASYNC251 - the loop stands still while libzmq carries all of it over
    await wait_until_async(lambda: sum(batches) == 2001, WAIT_S, f"everything is read: {batches}")
    assert len(batches) > 2
    router.close()
    await dealer.close()
    loop.set_exception_handler(usual)


async def read_to_end(dialled: asyncio.StreamReader) -> bytes:
    """What comes until the other side closes."""
    said = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await asyncio.wait_for(dialled.read(65536), WAIT_S):
            said += chunk
    return said


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + b"\0" + bytes(31)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HTTP/1.1\r\n\r\n" * 10, GREETING, GREETING + b"\x06" + (1 << 62).to_bytes(8, "big"), GREETING.replace(b"CURVE", b"NULL\0")],
    ids=["silence", "http", "half a handshake", "a giant", "no encryption"],
)  # fmt: skip
async def test_strangers_are_let_go_and_peers_are_served(sent: bytes) -> None:
    keys, own = KeyPair.generate(), KeyPair.generate()
    got: list[Incoming] = []
    router = Router(
        bind="tcp://127.0.0.1:*", keys=keys, known=bool, on_batch=got.extend, handshake_s=1.0
    )
    port = int(router.endpoint.rpartition(":")[2])
    strangers = [await asyncio.open_connection("127.0.0.1", port) for _ in range(50)]
    for _, writer in strangers:
        writer.write(sent)
    dealer = Dealer(
        endpoint=router.endpoint,
        server_key=keys.public,
        keys=own,
        on_batch=len,
        on_event=lambda *_: None,
    )
    dealer.send(b"hello")
    await wait_until_async(lambda: got, WAIT_S, "the peer is heard")
    assert got[0].key == own.public
    for reader, writer in strangers:
        assert len(await read_to_end(reader)) < 1000
        writer.close()
    assert len(got) == 1
    await dealer.close()
    router.close()


async def test_strangers_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    keys = KeyPair.generate()
    router = Router(bind="tcp://127.0.0.1:*", keys=keys, known=lambda _: False, on_batch=len)
    port = int(router.endpoint.rpartition(":")[2])
    for _ in range(60):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(GREETING.replace(b"CURVE", b"NULL\0"))
        await read_to_end(reader)
        writer.close()
    await wait_until_async(lambda: router.refusals >= 60, WAIT_S, "all were refused")
    lines = [each for each in caplog.records if each.message == "a peer's handshake failed"]
    assert 0 < len(lines) < 40
    router.close()
