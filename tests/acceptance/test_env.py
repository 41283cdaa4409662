"""A researcher asks where requests run, reads from a store there, and needs no torch to ask."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import pytest

from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.stack import MODEL, Stack, child_environ
from tests.acceptance.conftest import QUICK

#: The command line where the heavy libraries cannot be imported.
LIGHT = """
import sys
sys.modules |= dict.fromkeys(("torch", "transformers", "nnsight"))
from edif_hpc.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    reviews = {"text": ["The film was long", "and the book", "is short"], "label": [1, 0, 0]}
    datasets.Dataset.from_dict(reviews).save_to_disk(str(folder / "reviews"))
    return folder


@pytest.fixture(scope="module")
def stack(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, store: Path
) -> Iterator[Stack]:
    """A worker of a site with a store."""
    root, models = tmp_path_factory.mktemp("stack"), {MODEL: tiny_gpt2}
    engine = EngineFacts(stores=(str(store),), ready=1)
    with Stack(root=root, models=models, settings=QUICK, engine=engine) as running:
        running.deploy(limits={"wall_s": 60})
        running.launch()
        running.wait_warm()
        yield running


@pytest.fixture(scope="module")
def token(stack: Stack) -> str:
    return stack.token("ada")


@pytest.fixture
def env(stack: Stack, token: str) -> Callable[..., str]:
    """`edif-hpc env` of that researcher."""

    def call(*arguments: str) -> str:
        told = {"EDIF_RELAY": stack.url, "EDIF_TOKEN": token}
        done = subprocess.run(
            [sys.executable, "-c", LIGHT, "env", *arguments],
            env=child_environ() | told,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_env_tells_a_researcher_where_requests_run(env: Callable[..., str], store: Path) -> None:
    said = env("tiny", "--compare")
    assert said.startswith(f"tiny: {MODEL}, float32 on cpu, isolation ")
    assert f"torch {importlib.metadata.version('torch')}" in said
    assert f"stores (read-only): {store}" in said
    assert "wall_s             60 s, set by the deployment tiny" in said
    assert "or is not kept from it (?):\n    + import whatever the image" in said
    assert "this Python has the same versions of torch" in said


def test_a_request_reads_from_the_store(stack: Stack, token: str, store: Path) -> None:
    with ClientProcess(stack.client_environ(token), stack.root / "ada") as client:
        told = client.run(f"""
            from nnsight import TransformersModel
            model = TransformersModel({MODEL!r}, task="text-generation")
            with model.session(remote=True):
                import datasets
                reviews = datasets.load_from_disk("{store}/reviews").select(range(2))
                with model.trace(list(reviews["text"])):
                    logits = model.lm_head.output.save()
            report(shape=list(logits.shape))
        """)
        assert told["shape"][0] == 2
        with pytest.raises(CellFailed) as refused:
            client.run("""
                with model.trace("hello", remote=True):
                    import datasets
                    data = datasets.load_dataset("some/where")
                    n = len(data).save()
            """)
    assert "OfflineModeIsEnabled" in refused.value.text
    assert f"stores here: {store}" in refused.value.text
