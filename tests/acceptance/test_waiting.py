"""Where a researcher waits, something is said: no silence of 5 s, with the relay's ordinary settings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from edif_hpc.testing.client_process import ClientProcess
from edif_hpc.testing.hub import serve_hub
from edif_hpc.testing.noop_worker import Task
from edif_hpc.testing.proxy import Proxy
from edif_hpc.testing.raw_client import RawClient, RawSession, Told
from edif_hpc.testing.stack import MODEL, Stack
from edif_hpc.testing.wait import wait_until

SILENCE_S = 5.0
LASTS_S = 12.0
AT_ONCE = (
    "next; a worker takes it now"  # between the end of one run and the next, if a line falls there
)


class Ear:
    """Hears a session, and when."""

    def __init__(self, session: RawSession) -> None:
        self._session = session
        self.heard: list[tuple[float, Told]] = []

    def until_ended(self, request_id: str) -> Told:
        """Hear until the end of a request, which is returned."""
        frame = Told(id=request_id, status="RECEIVED")
        self.heard = [(time.monotonic(), frame)]
        while not frame.ended:
            frame = self._session.next()
            self.heard.append((time.monotonic(), frame))
        return frame

    @property
    def longest_silence_s(self) -> float:
        """Between two frames."""
        return max(later - sooner for (sooner, _), (later, _) in pairwise(self.heard))

    def lines(self, status: str) -> list[str]:
        """What was said in a state, without repetitions."""
        said = [each.description for _, each in self.heard if each.status == status]
        return list(dict.fromkeys(said))


@pytest.fixture
def noop(tmp_path: Path) -> Iterator[Stack]:
    """A relay with its ordinary settings, and one worker without a model."""
    with Stack(root=tmp_path / "stack") as stack:
        stack.deploy()
        stack.launch(engine="noop")
        stack.wait_warm()
        yield stack


def running(client: RawClient, request_id: str) -> None:
    wait_until(lambda: client.poll(request_id).status == "RUNNING", 30, "it runs")


def test_behind_a_long_run_and_in_one(noop: Stack) -> None:
    ada, bob = noop.client("ada"), noop.client("bob")
    first = ada.send(Task(name="first", seconds=LASTS_S).blob())
    running(ada, first)
    with bob.subscribe() as session:
        ear = Ear(session)
        mine = session.send(Task(name="mine", seconds=LASTS_S).blob())
        explained = noop.operator.get(f"/requests/{mine}/explain")
        assert ear.until_ended(mine).status == "COMPLETED"
    assert ear.longest_silence_s < SILENCE_S
    unknown = "next, behind 1 request of 1 person; start unknown, no run has ended yet"
    assert ear.lines("QUEUED")[0] == unknown
    assert set(ear.lines("QUEUED")) <= {unknown, AT_ONCE}
    assert (explained["state"], explained["why"], explained["position"]) == ("QUEUED", unknown, 1)
    runs = ear.lines("RUNNING")
    assert len(runs) >= LASTS_S // SILENCE_S
    assert all(each.startswith("runs on tiny/0 (") for each in runs)
    assert not any("ada" in each.description for _, each in ear.heard)

    second = ada.send(Task(name="second", seconds=LASTS_S).blob())
    running(ada, second)
    with bob.subscribe() as session:
        ear = Ear(session)
        assert ear.until_ended(session.send(Task(name="known").blob())).status == "COMPLETED"
    known = ear.lines("QUEUED")
    assert known[0].startswith("next, about ")
    assert all(
        each.endswith("s ahead of you: 1 request of 1 person") or each == AT_ONCE for each in known
    )


def test_while_a_worker_starts_and_loads(tmp_path: Path, tiny_gpt2: Path) -> None:
    """The model comes from its hub by a line so thin that it takes a while; the client is the unmodified one."""
    with Stack(root=tmp_path / "stack", models={MODEL: tiny_gpt2}) as stack:
        stack.deploy()
        with ClientProcess(stack.client_environ(stack.token("ada")), tmp_path / "ada") as client:
            client.run(f"from nnsight import LanguageModel; model = LanguageModel({MODEL!r})")
            size = (tiny_gpt2 / "model.safetensors").stat().st_size
            with serve_hub({MODEL: tiny_gpt2}) as hub, Proxy(int(hub.rpartition(":")[2])) as line:
                line.download_bytes_per_s = size / LASTS_S
                stack.hub = line.url
                stack.launch()
                seen = client.run("""
                    import asyncio, time
                    from nnsight.intervention.backends.remote import AsyncRemoteBackend
                    async def hear():
                        backend = AsyncRemoteBackend(model.to_model_key())
                        with model.trace("Hello", backend=backend):
                            out = model.lm_head.output.save()
                        seen = [(time.monotonic(), "", "")]
                        async for each in backend:
                            if not isinstance(each, dict):
                                seen.append((time.monotonic(), each.status.value, each.description))
                        return seen
                    report(seen=asyncio.run(hear()))
                """)["seen"]
    assert max(later[0] - sooner[0] for sooner, later in pairwise(seen)) < SILENCE_S
    assert seen[-1][1] == "COMPLETED"
    said = [line for _, status, line in seen if status == "DEPLOYING"]
    fetching = [each for each in said if each.startswith("the worker fetches the model")]
    assert len(set(fetching)) >= LASTS_S // SILENCE_S
    later = said[said.index(fetching[-1]) + 1 :]  # how many stages are seen depends on the machine
    stages = (
        "the worker imports its",
        "the worker loads the model",
        "the worker places the weights",
    )
    assert later
    assert all(each.startswith(stages) for each in later)
