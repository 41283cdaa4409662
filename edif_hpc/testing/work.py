"""Requests to send in volume, each with the one right result.

`NoopWork` is for workers without a model. `RealWork` was captured from the unmodified nnsight client in a process of its own:
a handful of traces that differ in what they save, in how long they run and in the size of their result. The right result of a
captured blob is what a calm relay answered; names and tensors are compared bit for bit (their order in the file may differ).
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.noop_worker import Task, result_of
from edif_hpc.testing.raw_client import RawClient
from edif_hpc.testing.stack import MODEL, Stack

_CAPTURE = """
import time, torch
from pathlib import Path
from nnsight.intervention.backends.remote import RemoteBackend
class Keep(RemoteBackend):
    def __call__(self, tracer=None):
        Path(self.file).write_bytes(self._serialize(tracer))
for number in range({count}):
    keep = Keep(model.to_model_key())
    keep.file = {folder!r} + f"/{{number}}.blob"
    pause, size = 0.1 * (number % 4), 600_000 if number % 4 == 3 else 10
    with model.trace(f"Hello number {{number}}", backend=keep):
        time.sleep(pause)
        logits = model.lm_head.output.save()
        noise = torch.rand(size, generator=torch.Generator().manual_seed(number)).save()
"""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One request to send."""

    blob: bytes
    right: Callable[[bytes], bool]  #: whether bytes are its one right result
    compress: bool
    runs_s: float = 0.0  #: how long it runs, if that is known


class Work(Protocol):
    """Where requests come from."""

    def piece(self, chance: random.Random) -> Piece:
        """The next one."""


class NoopWork:
    """Short and long ones, small and large ones, no two alike."""

    def piece(self, chance: random.Random) -> Piece:
        """The next one."""
        task = Task(
            name=f"{chance.getrandbits(64):016x}",
            seconds=chance.choice((0.0, 0.02, 0.1, 0.3)),
            result_bytes=chance.choice((64, 64, 64, 2 << 20)),
            padding="x" * chance.choice((0, 0, 0, 100_000)),
        )
        return Piece(blob=task.blob(), right=result_of(task.blob()).__eq__, compress=False)


class RealWork:
    """Captured traces."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces

    def piece(self, chance: random.Random) -> Piece:
        """One of them."""
        return chance.choice(self._pieces)


def capture(stack: Stack, client: RawClient, *, count: int = 8) -> RealWork:
    """Capture traces of the stack's model, and run each once in peace."""
    folder = stack.root / "captured"
    folder.mkdir()
    with ClientProcess(stack.client_environ(client.token), stack.root / "capturer") as process:
        process.run(f"from nnsight import LanguageModel; model = LanguageModel({MODEL!r})")
        process.run(_CAPTURE.format(count=count, folder=str(folder)))
    return RealWork([_calm(client, path) for path in sorted(folder.iterdir())])


def _calm(client: RawClient, path: Path) -> Piece:
    blob = path.read_bytes()
    end = client.ended(client.send(blob, compress=True))
    if end.status != "COMPLETED":
        raise RuntimeError(f"{path.name} ended in peace with {end.status}: {end.description}")
    told = content(client.result(end))
    return Piece(blob=blob, right=lambda data: content(data) == told, compress=True)


def content(result: bytes) -> dict[str, str]:
    """A hash of each saved tensor in a compressed result, by its name."""
    import torch
    import zstandard

    plain = zstandard.ZstdDecompressor().decompress(result)
    saved = torch.load(io.BytesIO(plain), weights_only=False)  # as the client does
    return {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in saved.items()
    }
