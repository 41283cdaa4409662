"""The whole comparison: tiny models on a loopback hub, a relay with a worker for each, and two clients at the same time.

The models bear the names that the documentation uses, and are shaped so that what its blocks say of layers, heads, columns and
tokens holds; the words of its prompts become their vocabulary.
"""

from __future__ import annotations

import ast
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from edif_hpc.domain.deployment import DEFAULT_TASK
from edif_hpc.testing import models
from edif_hpc.testing.fidelity import needs as needs_file
from edif_hpc.testing.fidelity.corpus import Block, blocks
from edif_hpc.testing.fidelity.needs import Needs
from edif_hpc.testing.fidelity.runner import Outcome, Plan
from edif_hpc.testing.fidelity.table import Row, rows
from edif_hpc.testing.operator import Unexpected
from edif_hpc.testing.stack import Stack, tail

GPT2: Final = "openai-community/gpt2"
LLAMA: Final = "meta-llama/Llama-3.1-70B"
BERT: Final = "google-bert/bert-base-uncased"
EXPERTS: Final = "mistralai/Mixtral-8x7B-v0.1"
TASKS: Final = {BERT: "feature-extraction"}
RUN_S: Final = 600.0
#: Threads that wait do not spin, since two clients and a worker share the cores; nothing draws progress bars.
ENVIRON: Final = {"OMP_WAIT_POLICY": "PASSIVE", "TQDM_DISABLE": "1"}

_WORD = re.compile(r" ?[A-Za-z']+")
_NO_PROMPT = re.compile(r"[/_{=]|\w\.\w")


def vocabulary(found: Sequence[Block], spelling: Mapping[str, Sequence[str]]) -> list[str]:
    """The words of the blocks' prompts, each to be one token, but for those that are spelled out."""
    words = []
    for block in found:
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                words += [] if _NO_PROMPT.search(node.value) else _WORD.findall(node.value)
    return [part for word in words for part in _spelled(word, spelling)]


def _spelled(word: str, spelling: Mapping[str, Sequence[str]]) -> Iterator[str]:
    space, parts = word[: word.startswith(" ")], spelling.get(word.strip(), [word.strip()])
    yield from [space + parts[0], *parts[1:]]


def build_models(folder: Path, words: Sequence[str]) -> dict[str, Path]:
    """Models of the families that the blocks name, under the names that they use."""
    return {
        GPT2: models.build_slim_gpt2(folder / "gpt2", words=words),
        LLAMA: models.build_chat_llama(folder / "llama", words=words),
        BERT: models.build_tiny_bert(folder / "bert", words=words),
        EXPERTS: models.build_tiny_experts(folder / "experts", words=words),
    }


def table(folder: Path) -> list[Row]:
    """Run every block that can be run, locally and remotely; judge all of them."""
    found, needs = blocks(), needs_file.read()
    with serving(folder, vocabulary(found, needs.spelling)) as stack:
        clients = [_start(stack, found, needs, remote=remote) for remote in (False, True)]
        local, remote = (client.finish() for client in clients)
    return rows(found, needs, local, remote)


@contextmanager
def serving(folder: Path, words: Sequence[str]) -> Iterator[Stack]:
    """A relay, with a warm worker for each model."""
    served = build_models(folder / "models", words)
    with Stack(root=folder / "stack", models=served) as stack:
        for number, repo_id in enumerate(served):
            stack.deploy(repo_id, name=f"docs-{number}", task=TASKS.get(repo_id, DEFAULT_TASK))
            stack.launch(f"docs-{number}")
        for number in range(len(served)):
            stack.wait_warm(f"docs-{number}")
        yield stack


@dataclass(frozen=True, kw_only=True)
class _Client:
    """A process that runs a plan; its files are named for it."""

    stem: Path
    process: subprocess.Popen[bytes]

    def finish(self) -> dict[str, Outcome]:
        """Wait for its end; return what its blocks did."""
        status = self.process.wait(RUN_S)
        if status:
            raise Unexpected(
                f"the {self.stem.name} run ended with {status}: {tail(self.stem.with_suffix('.log'))}"
            )
        told = self.stem.with_suffix(".pickle").read_bytes()
        facts = pickle.loads(told)  # noqa: S301 - by our own child
        return {name: Outcome(**fact) for name, fact in facts.items()}


def _start(stack: Stack, found: Sequence[Block], needs: Needs, *, remote: bool) -> _Client:
    stem = stack.root / ("remote" if remote else "local")
    token = stack.token(stem.name)
    words = {"{url}": stack.url, "{token}": token}
    pages = needs_file.pages(found, needs, remote=remote, words=words)
    plan, outcomes = stem.with_suffix(".json"), stem.with_suffix(".pickle")
    plan.write_bytes(msgspec.json.encode(Plan(folder=str(stem), pages=pages)))
    command = [sys.executable, "-m", "edif_hpc.testing.fidelity.runner", str(plan), str(outcomes)]
    environ = stack.client_environ(token) | ENVIRON
    with stem.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ
        )
    return _Client(stem=stem, process=process)
