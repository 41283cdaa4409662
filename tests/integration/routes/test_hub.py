"""Models come by the same way as all else, and where it is closed a copy that was fetched earlier serves."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edif_hpc.errors import EngineError
from edif_hpc.pilot.tunnel import Tunnel
from edif_hpc.pilot.upstream import Dial
from edif_hpc.wire.streams import Address, NoWay, Stream, dial
from edif_hpc.worker.engine import environment, launch
from edif_hpc.worker.engine.values import EngineSpec


@asynccontextmanager
async def tunnel(out: Dial) -> AsyncIterator[str]:
    made = Tunnel(out)
    try:
        yield await made.open_proxy()
    finally:
        await made.close()


def spec(folder: Path, hub: str, proxy: str, cache: str = "cache") -> EngineSpec:
    environment.home(folder / "scratch").mkdir(exist_ok=True, parents=True)
    return EngineSpec(
        model_key="k",
        source="edif/tiny-gpt2",
        scratch=folder / "scratch",
        hub_endpoint=hub,
        hub_cache=folder / cache,
        proxy=proxy,
    )


async def test_models_come_through_the_proxy(loopback_hub: str, tmp_path: Path) -> None:
    seen: set[Address] = set()

    async def out(where: Address) -> Stream:
        seen.add(where)
        return await dial(where)

    async def shut(_: Address) -> Stream:
        raise NoWay("the way is closed")

    async with tunnel(out) as proxy:
        first = await launch._fetched(spec(tmp_path, loopback_hub, proxy), lambda _: None)
    assert seen == {Address.parse(loopback_hub.removeprefix("http://"))}
    async with tunnel(shut) as proxy:
        again = await launch._fetched(spec(tmp_path, loopback_hub, proxy), lambda _: None)
        assert again == first
        with pytest.raises(EngineError, match=r"cannot have 'edif/tiny-gpt2'"):
            await launch._fetched(spec(tmp_path, loopback_hub, proxy, "empty"), lambda _: None)
