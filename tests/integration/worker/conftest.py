"""Engines with a tiny model, and an unmodified client whose requests are caught instead of sent.

A *block* is a function with a traced `with` in it that takes the model and the keywords of `trace`. Run
with none it is the local run; run with `catching()` it ends with the blob that a client would send.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from nnsight import TransformersModel
from nnsight.intervention.backends.remote import RemoteBackend

from edif_hpc.testing.absent import absent
from edif_hpc.worker.engine.pool import Engine
from edif_hpc.worker.engine.values import (
    EngineInfo,
    EngineSpec,
    Failed,
    Job,
    Level,
    Limits,
    Outcome,
    Saved,
)

KEY = (
    "nnsight.modeling.transformers.TransformersModel:"
    '{"repo_id": "edif/tiny", "revision": null, "task": "text-generation"}'
)
Block = Callable[..., Any]


class Caught(Exception):
    """Carries the blob out of the traced block."""

    def __init__(self, blob: bytes, env: dict[str, Any]) -> None:
        super().__init__(f"{len(blob)} bytes")
        self.blob, self.env = blob, env


class Catching(RemoteBackend):
    """The client's own remote backend, up to the moment of sending."""

    def __call__(self, tracer: Any = None) -> Any:
        raise Caught(self._serialize(tracer), self.env)


@dataclass(kw_only=True)
class Reply:
    """How a request ended, and what it printed."""

    outcome: Outcome
    printed: list[str]
    compress: bool = True

    @property
    def saved(self) -> Saved:
        assert isinstance(self.outcome, Saved), self.outcome
        return self.outcome

    @property
    def failed(self) -> Failed:
        assert isinstance(self.outcome, Failed), self.outcome
        return self.outcome

    @property
    def values(self) -> dict[str, Any]:
        """The names that the client would bind, loaded as it does."""
        content = self.saved.inline
        if self.saved.file is not None:
            content = self.saved.file.read_bytes()
            self.saved.file.unlink()
        assert content is not None
        assert len(content) == self.saved.size
        if self.compress:
            content = zstandard.ZstdDecompressor().decompress(content)
        values = torch.load(io.BytesIO(content), map_location="cpu", weights_only=False)
        assert isinstance(values, dict)
        return values


@dataclass(kw_only=True)
class Service:
    """An engine, and the client's model that sends to it."""

    engine: Engine
    info: EngineInfo
    model: Any
    key: str = KEY
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 30)))

    def job(self, block: Block, *, compress: bool = True, limits: Limits | None = None) -> Job:
        backend = Catching(self.key, env=self.model._remoteable_get_env())
        backend.compress = compress
        with pytest.raises(Caught) as caught:
            block(self.model, backend=backend)
        return Job(
            request_id=f"request-{next(self.numbers)}",
            attempt=1,
            blob=caught.value.blob,
            compress=compress,
            env=caught.value.env,
            model_key=self.key,
            limits=limits or Limits(wall_s=60),
        )

    async def send(self, block: Block, **options: Any) -> Reply:
        return await self.run(self.job(block, **options))

    async def run(self, job: Job) -> Reply:
        printed: list[str] = []
        outcome = await self.engine.run(job, printed.append)
        return Reply(outcome=outcome, printed=printed, compress=job.compress)


def client(path: Path) -> Any:
    """The client's model, with weights so that it can also run locally."""
    return TransformersModel(str(path), task="text-generation", dispatch=True)


def spec(source: Path, scratch: Path, **changes: Any) -> EngineSpec:
    """What to load, at whatever level this machine reaches, with the threads of a local run."""
    threads = torch.get_num_threads()
    settings = {"floor": Level.PROCESS, "ready": 1, "threads": threads} | changes
    return EngineSpec(model_key=KEY, source=str(source), scratch=scratch, **settings)


@asynccontextmanager
async def serving(
    model: Any, source: Path, scratch: Path, **changes: Any
) -> AsyncIterator[Service]:
    """An engine for the duration of the context."""
    engine = Engine(spec(source, scratch, **changes))
    info = await engine.start()
    try:
        yield Service(engine=engine, info=info, model=model)
    finally:
        await engine.stop()


@pytest.fixture(scope="session")
def gpt2(tiny_gpt2: Path) -> Any:
    return client(tiny_gpt2)


@pytest.fixture(scope="session")
async def service(
    gpt2: Any, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    """An engine that tests share; whoever breaks one makes its own."""
    scratch = tmp_path_factory.mktemp("engine")
    async with serving(gpt2, tiny_gpt2, scratch, ready=2) as shared:
        yield shared


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the site with data, which requests may read."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages as `pip install --target` leaves one; of einops, which the image has, it has another version."""
    folder = tmp_path_factory.mktemp("library")
    for name, version in {"our_probes": "1.2.3", "einops": "0.0.1"}.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"__version__ = {version!r}")
        facts = folder / f"{name}-{version}.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (facts / "top_level.txt").write_text(name)
    return folder


@pytest.fixture(scope="session", params=list(Level), ids=str)
async def walled(
    request: pytest.FixtureRequest,
    gpt2: Any,
    tiny_gpt2: Path,
    store: Path,
    library: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Service]:
    """An engine at each level that this machine reaches, with a store and a library."""
    level: Level = request.param
    scratch = tmp_path_factory.mktemp("walled")
    readable = {"stores": (str(store),), "libraries": (str(library),)}
    async with serving(gpt2, tiny_gpt2, scratch, ceiling=level, **readable) as one:
        if one.info.isolation.level is not level:
            absent(f"not to be had here: {one.info.isolation.missing}")
        yield one
