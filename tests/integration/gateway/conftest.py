"""The world of the gateway's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from edif_hpc.testing.gateway import World, a_world


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A relay with the deployment `tiny` and no workers."""
    async with a_world(tmp_path) as world:
        yield world
