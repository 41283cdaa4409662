"""What all tests share: a clean environment, tiers by folder, tiny models, a loopback hub.

The folder below `tests/` names the tier, and the tier becomes a marker. Nothing here reaches the
network: the hub's address points at a closed port unless a test asks for `loopback_hub`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from edif_hpc.testing.absent import absent
from edif_hpc.testing.adapters import build_tiny_lora
from edif_hpc.testing.debian import PartMissing
from edif_hpc.testing.hub import serve_hub
from edif_hpc.testing.models import (
    build_masked_bert,
    build_tiny_gpt2,
    build_tiny_llama,
    build_tiny_t5,
)

if TYPE_CHECKING:
    from edif_hpc.testing.ceph import S3Server
    from edif_hpc.testing.slurm import SlurmCluster

TESTS = Path(__file__).parent
TIERS = ("unit", "contract", "model", "integration", "acceptance")
FOREIGN = ("EDIF_", "HF_", "HUGGING_FACE_", "NDIF_", "NNSIGHT_", "SLURM_", "SBATCH_")
CLOSED_PORT = "http://127.0.0.1:9"

for variable in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[variable]
os.environ["HF_ENDPOINT"] = CLOSED_PORT
# Started in the background, or by nohup, we ignore these, and so would all that tests start to send them to.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, lambda *_: None),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# A deadline per example would time the machine, which other work may share.
hypothesis.settings.register_profile("edif", deadline=None, print_blob=True)
hypothesis.settings.load_profile("edif")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its tier; a test outside a tier's folder is a mistake."""
    for item in items:
        tier = item.path.relative_to(TESTS).parts[0]
        if tier not in TIERS:
            raise pytest.UsageError(f"{item.path} lies in none of tests/{{{','.join(TIERS)}}}")
        item.add_marker(tier)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests run on asyncio, as our processes do."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny GPT-2; read only."""
    return build_tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama; read only."""
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def masked_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny BERT that fills masks and has no pooler; read only."""
    return build_masked_bert(tmp_path_factory.mktemp("models") / "masked-bert")


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny T5; read only."""
    return build_tiny_t5(tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="session")
def tiny_lora(tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path) -> Path:
    """The folder of an adapter for the tiny GPT-2; read only."""
    return build_tiny_lora(tmp_path_factory.mktemp("adapters") / "tiny-lora", tiny_gpt2)


@pytest.fixture(scope="session")
def loopback_hub(tiny_gpt2: Path, tiny_llama: Path) -> Iterator[str]:
    """The URL of a hub with `edif/tiny-gpt2`, `edif/tiny-llama` and the old name `tiny-gpt2`."""
    repos = {"edif/tiny-gpt2": tiny_gpt2, "edif/tiny-llama": tiny_llama}
    with serve_hub(repos, {"tiny-gpt2": "edif/tiny-gpt2"}) as url:
        yield url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (Ceph's), shared by all tests that need one."""
    from edif_hpc.testing.ceph import serve_s3

    try:
        with serve_s3(tmp_path_factory.mktemp("ceph") / "root") as server:
            yield server
    except PartMissing as missing:
        absent(str(missing))


@pytest.fixture(scope="session")
def s3_bucket(s3_server: S3Server) -> str:
    """A bucket; each test takes a prefix of its own."""
    return s3_server.make_bucket("results")


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A real Slurm, shared by all tests that need one; its jobs run as an ordinary user."""
    from edif_hpc.testing.slurm import serve_slurm

    # pytest's own folders are closed to that user.
    with tempfile.TemporaryDirectory(prefix="edif-slurm-") as folder:
        Path(folder).chmod(0o755)
        try:
            with serve_slurm(Path(folder) / "root") as cluster:
                yield cluster
        except PartMissing as missing:
            absent(str(missing))


@pytest.fixture(scope="session")
def apptainer() -> Path:
    """The program of a real Apptainer."""
    from edif_hpc.testing.apptainer import cache_folder, install_apptainer

    try:
        return install_apptainer(cache_folder())
    except PartMissing as missing:
        absent(str(missing))


@pytest.fixture(scope="session")
def worker_image(apptainer: Path) -> Path:
    """The worker's image for CPUs; built within minutes, and kept for as long as the code is the same."""
    from edif_hpc.testing.apptainer import build_worker_image, cache_folder

    try:
        return build_worker_image(apptainer, cache_folder())
    except PartMissing as missing:
        absent(str(missing))


@pytest.fixture(scope="session")
def ordinary_user() -> list[str]:
    """The start of a command line that runs as someone who is not root; empty if we are not."""
    if os.geteuid() != 0:
        return []
    prefix = ["runuser", "-u", "nobody", "--"]
    try_import = [*prefix, sys.executable, "-c", "import edif_hpc"]
    attempt = subprocess.run(try_import, capture_output=True, text=True, check=False)
    if attempt.returncode != 0:
        absent(f"nobody cannot run {sys.executable}: {attempt.stderr.strip()[-200:]}")
    return prefix
