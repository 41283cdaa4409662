"""Researchers who mean harm: each attempt, by an unmodified client, at each level, and a clean request after it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from edif_hpc.slurm.order import EngineFacts
from edif_hpc.testing.absent import absent
from edif_hpc.testing.attacks import runner
from edif_hpc.testing.attacks.expected import CASES, Case
from edif_hpc.testing.attacks.ground import Ground
from edif_hpc.testing.attacks.knocks import BLOBS, INJECTED, KNOCKS, Knock, send
from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.processes import Process, processes_of
from edif_hpc.testing.raw_client import RawClient
from edif_hpc.testing.stack import Stack, child_environ
from edif_hpc.testing.wait import wait_until
from edif_hpc.worker.engine.values import Level

MIB = 1 << 20
SETTINGS = {"lease_s": 30.0, "heartbeat_s": 0.5, "ws_grace_s": 2.0}
GONE_S = 60.0
#: Why a request ends is told in time, or the walls are at fault; the machine may be slow.
CASE_S = 240.0

CLEAN = """
import hashlib, nnsight
from nnsight.intervention.backends.remote import RemoteBackend

def clean(model, token):
    backend = RemoteBackend(model.to_model_key(), api_key=token)
    with model.trace("Hello world, said nobody", backend=backend):
        hidden = model.transformer.h[0].output[0].save()
        logits = model.lm_head.output.save()
    return hashlib.sha256(hidden.numpy().tobytes() + logits.numpy().tobytes()).hexdigest()
"""
TRY = """
from nnsight.intervention.backends.remote import RemoteBackend
backend = RemoteBackend(model.to_model_key(), api_key={token!r})
try:
    told = dict(block(model, backend=backend))
    kind = ""
except Exception as error:
    kind = ((backend.meta or {{}}).get("error") or {{}}).get("kind") or type(error).__name__
    told = {{"end": "", "text": str(error)[-400:]}}
meta = dict(backend.meta or {{}})
report(kind=kind, meta=meta, **told)
"""


@dataclass(kw_only=True)
class Battlefield:
    """A relay, a client, and the worker of one level."""

    level: Level
    stack: Stack
    client: ClientProcess
    ground: Ground
    order: Path  #: of the worker: its key is in it
    tokens: Mapping[str, str]
    clean: str = ""
    before: frozenset[int] = frozenset()  #: the processes that have to outlive everything

    @property
    def scratch(self) -> Path:
        """The engine's folder."""
        return self.order.with_name("worker") / "engine"

    def attempt(self, case: Case) -> tuple[runner.Told, dict[str, Any]]:
        """Send an attempt; how it ended, and its meta."""
        block = runner.source(case, self.facts())
        code = f"model = models[{str(self.level)!r}]\n{block}\n{TRY.format(token=self.tokens[case.limits])}"
        try:
            told = self.client.run(code, CASE_S)
        except TimeoutError:
            self.end_all()
            self.client.wait(CASE_S)
            raise
        return runner.Told(kind=told["kind"], end=told["end"], text=told["text"]), told["meta"]

    def end_all(self) -> None:
        """Cancel what runs, so that the client is free for the next case."""
        for each in self.stack.operator.get("/requests?state=running")["requests"]:
            self.stack.operator.call("DELETE", f"/requests/{each['id']}")

    def digest(self) -> str:
        """Of the numbers of a request that means no harm."""
        code = f"report(digest=clean(models[{str(self.level)!r}], {self.tokens['usual']!r}))"
        told: str = self.client.run(code, CASE_S)["digest"]
        return told

    def facts(self) -> dict[str, Any]:
        """What payloads are told."""
        [worker] = [each.pid for each in self.own() if each.kind == "worker"]
        cache = self.stack.root / "cache" / f"models--edif--{self.level}"
        weights = next(cache.rglob("*.safetensors"))
        told = self.ground.facts(
            worker=worker, zygote=self.zygote(), scratch=self.scratch, weights=weights
        )
        relay = {"relay_data": str(self.stack.data_dir), "port": self.stack.port}
        return told | relay | {"order": str(self.order)}

    def own(self) -> list[Process]:
        """The processes of this level's allocation."""
        return processes_of(self.order.parent)

    def zygote(self) -> int:
        """The process that forks: under the one that the worker started, if it has a namespace of its own."""
        [worker] = [each.pid for each in self.own() if each.kind == "worker"]
        [first] = [each.pid for each in self.own() if each.parent == worker]
        if self.level is not Level.FULL:
            return first
        return min(each.pid for each in self.own() if each.parent == first)

    def strays(self) -> list[Process]:
        """Processes that no one of ours has started."""
        known = {self.zygote(), *self.before}
        return [each for each in self.own() if each.pid not in known and each.parent not in known]


@pytest.fixture(scope="module")
def public() -> Iterator[Path]:
    """A folder that other users may look into; pytest's own are closed to them."""
    with tempfile.TemporaryDirectory(prefix="edif-strangers-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(scope="module")
def stack(public: Path, tiny_gpt2: Path, ordinary_user: list[str]) -> Iterator[Stack]:
    """A relay, and a worker at each level; not by root, for whom many a wall does not stand."""
    user = "nobody" if ordinary_user else None
    models = {f"edif/{level}": tiny_gpt2 for level in Level}
    with Stack(root=public / "stack", models=models, settings=SETTINGS, user=user) as running:
        for level in Level:
            running.engine = EngineFacts(isolation_ceiling=str(level))
            running.deploy(f"edif/{level}", name=str(level), isolation_floor=str(level))
            running.launch(str(level))
        for level in Level:
            running.wait_warm(str(level))
        yield running


@pytest.fixture(scope="module")
def tokens(stack: Stack) -> dict[str, str]:
    """By what a case wants of limits."""
    small = {"memory_bytes": 192 * MIB, "scratch_bytes": 64 * MIB, "wall_s": 100.0}
    limits = {
        "usual": {"wall_s": 100.0},
        "hasty": {"wall_s": 1.0},
        "small": small,
        "little": {"result_bytes": 4 * MIB},
    }
    return {name: stack.token(name, limits=allowed) for name, allowed in limits.items()}


@pytest.fixture(scope="module")
def client(stack: Stack, tokens: dict[str, str]) -> Iterator[ClientProcess]:
    """One researcher with all the tokens."""
    with ClientProcess(stack.client_environ(tokens["usual"]), stack.root / "mallory") as process:
        names = [str(level) for level in Level]
        process.run(
            "from nnsight import LanguageModel\n"
            f"models = {{name: LanguageModel('edif/' + name) for name in {names}}}\n{CLEAN}"
        )
        yield process


@pytest.fixture(scope="module", params=list(Level), ids=str)
def battlefield(
    request: pytest.FixtureRequest,
    stack: Stack,
    client: ClientProcess,
    tokens: dict[str, str],
    public: Path,
) -> Iterator[Battlefield]:
    level: Level = request.param
    [line] = stack.operator.workers(str(level))
    if line["worker"]["isolation"] != level:
        absent(f"{level} is not to be had here")
    [command] = [
        each.command
        for each in stack.processes("worker")
        if f"{level}" in each.command.partition("edif_hpc.worker.app")[2]
    ]
    order = Path(command.partition("edif_hpc.worker.app ")[2].split()[0])
    with Ground(root=public / f"ground-{level}", user=stack.user) as ground:
        field = Battlefield(
            level=level, stack=stack, client=client, ground=ground, order=order, tokens=tokens
        )
        field.before = frozenset(
            each.pid
            for each in stack.processes()
            if each.kind in {"relay", "pilot", "worker", "zygote"}
        )
        field.clean = field.digest()
        yield field


def honest(meta: Mapping[str, Any], exploded: str, client: ClientProcess) -> bool:
    """Whether meta tells what the relay and the worker saw, and nobody but the client has loaded a result."""
    told = (
        meta.get("attempt", 1) <= 3
        and meta.get("queued_s", 0) < 1e6
        and meta.get("runtime_s", 0) >= 0
    )
    return told and set(exploded.split()) <= {str(client.process.pid)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_attempt(battlefield: Battlefield, case: Case) -> None:
    told, meta = battlefield.attempt(case)
    left = battlefield.ground.left("/tmp", "/dev/shm", str(battlefield.facts()["home"]))
    assert wait_until(lambda: not battlefield.strays(), GONE_S, "no process is left")
    found = runner.outcome(told, left, returned=case.returned)
    assert found in case.outcomes[battlefield.level], (told, left)
    assert honest(meta, battlefield.ground.exploded(), battlefield.client)
    assert battlefield.digest() == battlefield.clean
    assert battlefield.before <= {each.pid for each in battlefield.stack.processes()}


# -- at the relay's door -----------------------------------------------------------------------------------------------


NON_BLOCKING = """
from nnsight.intervention.backends.remote import RemoteBackend
model = models["full"]
backend = RemoteBackend(model.to_model_key(), api_key={token!r}, blocking=False)
with model.trace("hello", backend=backend):
    out = model.lm_head.output.save()
report(id=backend.job_id, key=model.to_model_key())
"""
FORGED = f"""
with models["full"].session(remote=True):
    print({INJECTED!r} + "\\n2026-01-01 ERROR forged")
    raise RuntimeError({INJECTED!r} + "\\r\\n2026-01-01 ERROR forged")
"""


def ended(client: ClientProcess, raw: RawClient) -> tuple[str, str, str]:
    """A request of theirs that has come to its end: its id, its result's link, its model key."""
    told = client.run(NON_BLOCKING.format(token=raw.token))
    return told["id"], str(raw.ended(told["id"]).data), told["key"]


@pytest.fixture(scope="module")
def known(stack: Stack, client: ClientProcess) -> Iterator[dict[str, str]]:
    """What Mallory knows: an own result with its link, and the ids of another's request and session."""
    victim, mallory = stack.client("victim"), stack.client("mallory")
    theirs, _, _ = ended(client, victim)
    own, link, key = ended(client, mallory)
    parts = urlsplit(link)
    query = dict(parse_qsl(parts.query))
    with victim.subscribe() as session:
        yield query | {
            "token": mallory.token,
            "model_key": key,
            "victim": theirs,
            "own": own,
            "query": parts.query,
            "session": session.id,
        }


@pytest.mark.parametrize("attempt", KNOCKS, ids=lambda attempt: attempt.name)
def test_a_knock(stack: Stack, known: dict[str, str], attempt: Knock) -> None:
    before = stack.processes("relay")
    status, answer = send(stack.url, attempt, known)
    assert status in attempt.refused, answer[:500]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"set-cookie" not in head.lower()
    assert b"Traceback" not in body
    assert [each.pid for each in stack.processes("relay")] == [each.pid for each in before]
    with httpx.Client() as again:
        assert again.get(f"{stack.url}/ping").is_success


@pytest.mark.parametrize("name", BLOBS)
def test_a_bomb_in_a_request(
    battlefield: Battlefield, known: dict[str, str], tokens: dict[str, str], name: str
) -> None:
    make, kinds = BLOBS[name]
    key = known["model_key"].replace("edif/full", f"edif/{battlefield.level}")
    sender = RawClient(url=battlefield.stack.url, token=tokens["small"], model_key=key)
    end = sender.ended(sender.send(make(), compress=True), CASE_S)
    assert (end.status, end.kind in kinds) == ("ERROR", True), end
    assert battlefield.digest() == battlefield.clean
    assert battlefield.before <= {each.pid for each in battlefield.stack.processes()}


def test_nothing_forged_reaches_a_terminal_or_a_log(
    stack: Stack, client: ClientProcess, known: dict[str, str]
) -> None:
    """Runs last: what all attempts have said is in the log by now."""
    with pytest.raises(CellFailed, match="FORGED"):
        client.run(FORGED)
    listed = stack.operator.get("/requests?limit=1")["requests"]
    environ = child_environ() | {"EDIF_RELAY": stack.url, "EDIF_TOKEN": stack.operator.token}
    for command in (["ls"], ["show", listed[0]["id"]]):
        shown = subprocess.run(
            [sys.executable, "-m", "edif_hpc.cli.main", "request", *command],
            env=environ, capture_output=True, text=True, check=True, timeout=CASE_S,
        )  # fmt: skip
        assert shown.stdout
        assert "\x1b" not in shown.stdout + shown.stderr
        assert not [line for line in shown.stdout.splitlines() if line.startswith("2026-01-01")]
    log = (stack.root / "relay.log").read_text()
    assert "\x1b" not in log
    assert not [line for line in log.splitlines() if line.startswith(("2026 ERROR", "2026-01-01"))]
