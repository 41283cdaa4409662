"""A whole edif-hpc whose workers run in a real Apptainer."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edif_hpc.slurm.order import ContainerOrder, EngineFacts
from edif_hpc.testing.stack import MODEL, Stack

HUB_TOKEN = "hf_token_of_the_lab"


@pytest.fixture(scope="session")
def container(apptainer: Path, worker_image: Path) -> ContainerOrder:
    """The order for it, as a site's file would have it."""
    with worker_image.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ContainerOrder(image=str(worker_image), sha256=digest, apptainer=str(apptainer))


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that an ordinary user can reach; pytest's own are closed to others."""
    with tempfile.TemporaryDirectory(prefix="edif-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def stack(
    container: ContainerOrder, ordinary_user: list[str], tiny_gpt2: Path, public: Path
) -> Iterator[Stack]:
    """A relay here, and pilots that run as an ordinary user; the site has a store."""
    store = public / "store"
    store.mkdir()
    store.chmod(0o777)  # nobody writes there all the same
    (store / "numbers.csv").write_text("a,b\n1,2\n3,5\n")
    with Stack(
        root=public / "stack",
        models={MODEL: tiny_gpt2},
        engine=EngineFacts(threads=1, hub_token=HUB_TOKEN, stores=(str(store),)),
        container=container,
        user="nobody" if ordinary_user else None,
    ) as stack:
        stack.deploy(replicas=2)
        yield stack


@pytest.fixture(scope="session", autouse=True)
def _umask() -> Iterator[None]:
    """What is made for the ordinary user has to be readable."""
    before = os.umask(0o022)
    yield
    os.umask(before)
