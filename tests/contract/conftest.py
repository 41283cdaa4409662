"""What the contracts of stores share: each store in turn, and a way to call it without spelling out transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edif_hpc.failpoints import Failpoints
from edif_hpc.store.base import Store
from edif_hpc.store.memory import MemoryStore
from edif_hpc.store.sqlite import SqliteStore

Make = Callable[..., Store]


@pytest.fixture(params=["memory", "sqlite"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Make]:
    """Make the store under test, with failpoints if wanted."""
    made: list[Store] = []

    def build(failpoints: Failpoints | None = None) -> Store:
        store: Store
        if request.param == "memory":
            store = MemoryStore(failpoints)
        else:
            store = SqliteStore(tmp_path / "queue.sqlite", failpoints)
        store.open()
        made.append(store)
        return store

    yield build
    for store in made:
        store.close()


@pytest.fixture
def store(make: Make) -> Store:
    """The store under test, open and empty."""
    return make()


class Each:
    """Runs each method of a store in a transaction and a savepoint of its own."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._store.transaction(), self._store.savepoint():
                return getattr(self._store, name)(*args, **kwargs)

        return call


@pytest.fixture
def do(store: Store) -> Any:
    """The store, each method of it in a transaction of its own."""
    return Each(store)
