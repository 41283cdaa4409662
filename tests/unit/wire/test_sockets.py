"""Keys on disk, and a reader that misses nothing."""

from __future__ import annotations

import asyncio
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
