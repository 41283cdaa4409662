"""How many durable lease + done cycles a relay makes in a second, over CURVE, with workers that do nothing.

The relay is a real process on a real disk. Requests are put into its queue while it is down, so that accepting them is not
measured. The workers are connections of one process here, each with a key of its own; on a grant they answer DONE with a
result of 64 bytes and nothing else, so what is measured is the relay: receive, decide, commit (fsync), send.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import secrets
import sys
import tempfile
import time
from pathlib import Path

import httpx

from edif_hpc.domain.request import Limits, NewRequest
from edif_hpc.store.base import Store
from edif_hpc.store.sqlite import SqliteStore
from edif_hpc.store.writer import Writer
from edif_hpc.testing.stack import Stack
from edif_hpc.wire import codec
from edif_hpc.wire import messages as m
from edif_hpc.wire.sockets import Dealer, KeyPair

_RESULT = b"r" * 64
_BLOB = b"b" * 2048
_WINDOW = 2


class _Peer:
    """A worker that answers every grant at once."""

    def __init__(self, *, endpoint: str, server_key: str, keys: KeyPair) -> None:
        self.done = 0
        self.warm = asyncio.Event()
        self._dealer = Dealer(
            endpoint=endpoint,
            server_key=server_key,
            keys=keys,
            on_batch=self._received,
            on_event=lambda *_: None,
        )
        self._send(m.Hello(versions=[1], nonce=secrets.token_hex(8), state="warm"))

    def pull(self) -> None:
        """Begin to take work."""
        self._send(m.Pull(window=_WINDOW, executors=1))

    async def close(self) -> None:
        """Leave."""
        self._send(m.Goodbye(cause="bench"))
        await self._dealer.close()

    def _send(self, message: m.Message) -> None:
        self._dealer.send(codec.encode(message))

    def _received(self, frames: list[bytes]) -> None:
        for frame in frames:
            message = codec.decode_from_relay(frame)
            if isinstance(message, m.Grant):
                self._send(m.Started(request=message.request, attempt=message.attempt))
                done = m.Done(
                    request=message.request,
                    attempt=message.attempt,
                    size=len(_RESULT),
                    inline=_RESULT,
                    meta={"runtime": 0.001},
                )
                self._send(done)
            elif isinstance(message, m.Ack):
                self.done += 1
            elif isinstance(message, m.Welcome):
                self.warm.set()


def _fill(database: Path, count: int, model_key: str) -> None:
    store = SqliteStore(database)
    store.open()
    now = time.time()
    digest = hashlib.sha256(_BLOB).hexdigest()

    def accept(opened: Store) -> None:
        for number in range(count):
            new = NewRequest(
                id=secrets.token_hex(16),
                owner=f"owner{number % 4}",
                deployment="tiny",
                model_key=model_key,
                compress=True,
                env={},
                blob_bytes=len(_BLOB),
                blob_sha256=digest,
                limits=Limits(),
                accepted_at=now,
                expires_at=now + 86400,
            )
            opened.accept(new, _BLOB)

    Writer(store).run(accept)
    store.close()


async def _drive(stack: Stack, workers: int, count: int) -> float:
    peers = []
    made = stack.operator.post(
        "/allocations", {"deployment": "tiny", "site": "local", "slots": workers}
    )["allocations"]
    async with httpx.AsyncClient(timeout=60.0) as http:
        for each in made:
            keys, pilot = KeyPair.generate(), KeyPair.generate()
            body = {
                "join_token": each["join_token"],
                "worker_key": keys.public,
                "pilot_key": pilot.public,
                "node": "bench",
            }
            joined = (
                (await http.post(f"{stack.url}/api/join", json=body)).raise_for_status().json()
            )
            peers.append(
                _Peer(endpoint=joined["endpoint"], server_key=joined["server_key"], keys=keys)
            )
    for peer in peers:
        await asyncio.wait_for(peer.warm.wait(), 30.0)
    began = time.perf_counter()
    for peer in peers:
        peer.pull()
    while sum(peer.done for peer in peers) < count:
        if time.perf_counter() - began > 300.0:
            raise TimeoutError(
                f"{sum(peer.done for peer in peers)} of {count} requests were done after 300 s"
            )
        await asyncio.sleep(0.005)  # the clock of a measurement, not a condition of a test
    took = time.perf_counter() - began
    for peer in peers:
        await peer.close()
    return took


def measure(workers: int, count: int) -> float:
    """Cycles per second."""
    with (
        tempfile.TemporaryDirectory(prefix="edif-bench-") as folder,
        Stack(root=Path(folder) / "stack", settings={"log_level": "warning"}) as stack,
    ):
        key = stack.deploy("edif/none", name="tiny", replicas=workers)
        stack.stop_relay()
        _fill(stack.data_dir / "queue.sqlite", count, key)
        stack.start_relay()
        return count / asyncio.run(_drive(stack, workers, count))


def main(argv: list[str]) -> int:
    """`leases [--requests N]`: one worker, then sixteen."""
    parser = argparse.ArgumentParser(prog="bench leases", description=__doc__)
    parser.add_argument("--requests", type=int, default=6000)
    given = parser.parse_args(argv)
    print(
        "durable lease + done over CURVE, no-op workers (fsync per commit: yes, CURVE: yes, isolation: none)"
    )
    for workers in (1, 16):
        rate = measure(workers, given.requests)
        print(f"  {workers:2d} worker(s): {rate:7.0f} /s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
