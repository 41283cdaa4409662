"""What researchers do, with an unmodified nnsight client, a relay, and a worker with the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from edif_hpc.testing.client_process import CellFailed, ClientProcess
from edif_hpc.testing.proxy import Proxy
from edif_hpc.testing.raw_client import RawClient
from edif_hpc.testing.stack import MODEL, Stack
from edif_hpc.testing.wait import wait_until

GONE_S = 2.0
TRACE = """
with model.trace("hello", remote=True):
    out = model.lm_head.output.save()
report(dimensions=out.ndim)
"""
SLEEP_60 = """
import time
with model.trace("hello", remote=True):
    time.sleep(60)
    out = model.lm_head.output.save()
"""


@pytest.fixture(scope="module")
def local(client: ClientProcess) -> ClientProcess:
    """The client, with a second model that runs here, to compare with."""
    client.run(f"import torch; here = LanguageModel({MODEL!r}, dispatch=True)")
    return client


@pytest.fixture
def raw(stack: Stack) -> RawClient:
    return stack.client("operator's eyes", role="operator")


def running(stack: Stack, owner_name: str = "ada") -> str:
    """Wait until a request of theirs runs; returns its id."""
    owners = {each["name"]: each["id"] for each in stack.operator.get("/tokens")["tokens"]}

    def look() -> str | None:
        found = stack.operator.get(f"/requests?state=running&owner={owners[owner_name]}")[
            "requests"
        ]
        return found[0]["id"] if found else None

    return wait_until(look, 60, f"a request of {owner_name} runs") or ""


def state(stack: Stack, request_id: str) -> str:
    return str(stack.operator.get(f"/requests/{request_id}")["state"])


# -- ways to send ------------------------------------------------------------------------------------------------------


def test_a_blocking_trace_gives_the_numbers_of_a_local_run(local: ClientProcess) -> None:
    told = local.run("""
        with model.trace("Hello world", remote=True) as tracer:
            hidden = model.transformer.h[1].output[0].save()
            logits = model.lm_head.output.save()
        with here.trace("Hello world"):
            hidden_here = here.transformer.h[1].output[0].save()
            logits_here = here.lm_head.output.save()
        report(equal=[torch.equal(hidden, hidden_here), torch.equal(logits, logits_here)], meta=tracer.backend.meta)
    """)
    assert told["equal"] == [True, True]
    assert told["meta"]["attempt"] == 1
    assert {"dtype", "isolation", "queued_s", "runtime", "versions"} <= set(told["meta"])


@pytest.mark.parametrize("prompt", ["a", "Hello", "the quick brown fox"])
def test_prompts_of_one_and_of_many_tokens(local: ClientProcess, prompt: str) -> None:
    """A single row takes other kernels than many, and they look at how the weights lie in memory."""
    told = local.run(f"""
        with model.trace({prompt!r}, remote=True):
            there = model.lm_head.output.save()
        with here.trace({prompt!r}):
            expected = here.lm_head.output.save()
        report(equal=torch.equal(there, expected))
    """)
    assert told["equal"]


def test_an_edit_inside_a_trace(local: ClientProcess) -> None:
    told = local.run("""
        def patched(m, **where):
            with m.trace("Hello world", **where):
                m.transformer.h[0].output[0][:] = 0
                out = m.lm_head.output.save()
            return out
        report(equal=torch.equal(patched(model, remote=True), patched(here)))
    """)
    assert told["equal"]


def test_a_non_blocking_trace_is_polled_and_another_process_resumes_it(
    stack: Stack, client: ClientProcess
) -> None:
    told = client.run("""
        with model.trace("Hello", remote=True, blocking=False) as tracer:
            out = model.lm_head.output.save()
        report(job=tracer.backend.job_id, key=model.to_model_key(), token=tracer.backend.api_key)
    """)
    with ClientProcess(stack.client_environ(told["token"]), stack.root / "elsewhere") as elsewhere:
        resumed = elsewhere.run(f"""
            import time
            from nnsight.intervention.backends.remote import RemoteBackend
            backend = RemoteBackend({told["key"]!r}, job_id={told["job"]!r}, blocking=False)
            while (result := backend()) is None:
                time.sleep(0.05)
            report(names=sorted(result), shape=list(result["out"].shape))
        """)
    assert resumed["names"] == ["out"]
    assert resumed["shape"][-1] == 1024


def test_an_awaited_trace_and_an_iterated_one(client: ClientProcess) -> None:
    told = client.run("""
        import asyncio
        from nnsight.intervention.backends.remote import AsyncRemoteBackend
        def send():
            backend = AsyncRemoteBackend(model.to_model_key())
            with model.trace("Hello", backend=backend):
                out = model.lm_head.output.save()
            return backend
        async def main():
            first = await send()
            seen = [each async for each in send()]
            report(first=sorted(first), statuses=[str(each.status.value) for each in seen[:-1]], last=sorted(seen[-1]))
        asyncio.run(main())
    """)
    assert told["first"] == told["last"] == ["out"]
    assert told["statuses"][-1] == "COMPLETED"
    assert "RUNNING" in told["statuses"]


def test_a_session_of_two_traces(local: ClientProcess) -> None:
    told = local.run("""
        def both(m, **where):
            with m.session(**where):
                with m.trace("Hello"):
                    first = m.transformer.h[0].output[0]
                with m.trace("World"):
                    m.transformer.h[0].output[0][:] = first
                    out = m.lm_head.output.save()
            return out
        report(equal=torch.equal(both(model, remote=True), both(here)))
    """)
    assert told["equal"]


def test_a_generation_with_an_intervention(local: ClientProcess) -> None:
    told = local.run("""
        def generate(m, **where):
            with m.generate("Hello", max_new_tokens=4, do_sample=False, **where) as tracer:
                for _ in tracer.iter[0:4]:
                    m.transformer.h[1].mlp.output[:] = 0
                tokens = tracer.result.save()
            return tokens
        there, tokens = generate(model, remote=True), generate(here)
        report(equal=torch.equal(there, tokens), count=there.shape[-1])
    """)
    assert told["equal"]
    assert told["count"] >= 5


def test_prints_arrive_while_it_runs(client: ClientProcess) -> None:
    told = client.run("""
        import asyncio
        from nnsight.intervention.backends.remote import AsyncRemoteBackend
        backend = AsyncRemoteBackend(model.to_model_key())
        with model.trace("Hello", backend=backend):
            print("the shape is", model.lm_head.output.shape)
            out = model.lm_head.output.save()
        async def main():
            report(seen=[(each.status.value, each.description) async for each in backend if not isinstance(each, dict)])
        asyncio.run(main())
    """)
    logs = [text for status, text in told["seen"] if status == "LOG"]
    assert any("the shape is torch.Size" in text for text in logs)


def test_an_exception_points_at_the_users_own_line(client: ClientProcess) -> None:
    with pytest.raises(CellFailed) as caught:
        client.run("""
            with model.trace("Hello", remote=True):
                hidden = model.transformer.h[0].output[0]
                hidden[:, :, 999999] = 0
                out = model.lm_head.output.save()
        """)
    assert caught.value.error == "RemoteError"
    assert "hidden[:, :, 999999] = 0" in caught.value.text
    assert "IndexError" in caught.value.text


# -- questions ---------------------------------------------------------------------------------------------------------


def test_status_compare_whoami_and_is_model_running(client: ClientProcess) -> None:
    told = client.run(f"""
        import nnsight
        told = nnsight.status()
        compared = nnsight.compare()
        report(
            listed=list(told), running=nnsight.is_model_running({MODEL!r}), other=nnsight.is_model_running({MODEL!r}, revision="v2"),
            me=nnsight.ndif.whoami(), python=compared.remote_python, raw=nnsight.status(raw=True),
        )
    """)
    assert told["listed"] == [MODEL]
    assert told["running"] is True
    assert told["other"] is False
    assert told["me"] == {"email": "ada", "tags": ["researcher"]}
    assert told["python"].startswith("3.")
    [entry] = told["raw"]["deployments"].values()
    assert entry["application_state"] == "RUNNING"


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.5.13", "0.6.3", "0.7.0", "0.9.0", ""])
def test_another_version_is_told_what_to_install(
    stack: Stack, raw: RawClient, version: str
) -> None:
    old = RawClient(url=stack.url, token=raw.token, model_key="any", version=version)
    answer = old.post(b"x")
    assert answer.status_code == 400
    assert 'pip install "nnsight==0.8.*"' in answer.json()["detail"]


def test_a_socket_io_client_is_told_what_to_install(stack: Stack) -> None:
    answer = httpx.get(f"{stack.url}/ws/socket.io/?EIO=4&transport=polling")
    assert answer.status_code == 400
    assert 'pip install "nnsight==0.8.*"' in answer.text


def test_an_unknown_model_names_what_is_served(client: ClientProcess) -> None:
    with pytest.raises(CellFailed, match="tiny") as caught:
        client.run("""
            from nnsight.intervention.backends.remote import RemoteBackend
            backend = RemoteBackend(model.to_model_key().replace("tiny-gpt2", "huge-gpt5"))
            with model.trace("Hello", backend=backend):
                out = model.lm_head.output.save()
        """)
    assert caught.value.error == "RemoteError"
    assert "edif/huge-gpt5" in caught.value.text


def test_a_bad_token_is_refused(client: ClientProcess) -> None:
    with pytest.raises(CellFailed, match="401"):
        client.run("""
            from nnsight.intervention.backends.remote import RemoteBackend
            backend = RemoteBackend(model.to_model_key(), api_key="edif_nobody_nothing")
            with model.trace("Hello", backend=backend):
                out = model.lm_head.output.save()
        """)


def test_anothers_request_does_not_exist(stack: Stack, client: ClientProcess) -> None:
    told = client.run("""
        with model.trace("Hello", remote=True, blocking=False) as tracer:
            out = model.lm_head.output.save()
        report(job=tracer.backend.job_id)
    """)
    eve = stack.client("eve")
    answer = httpx.get(f"{stack.url}/response/{told['job']}", headers=eve.headers)
    assert answer.status_code == 404
    for verb in ("GET", "DELETE"):
        answer = httpx.request(
            verb, f"{stack.url}/api/requests/{told['job']}", headers=eve.headers
        )
        assert answer.status_code == 404


# -- ends --------------------------------------------------------------------------------------------------------------


def executors(stack: Stack) -> set[int]:
    return {each.pid for each in stack.processes("executor")}


def test_a_cancelled_request_stops_computing(stack: Stack, client: ClientProcess) -> None:
    before = executors(stack)
    client.start(SLEEP_60)
    request_id = running(stack)
    stack.operator.call("DELETE", f"/requests/{request_id}")
    wait_until(lambda: before - executors(stack), GONE_S, "the executor is gone")
    with pytest.raises(CellFailed, match="cancelled by the operator op"):
        client.wait()
    assert client.run(TRACE)["dimensions"] == 3


def test_a_request_over_its_time_is_stopped(stack: Stack) -> None:
    hasty = stack.token("hasty", limits={"wall_s": 1.0})
    with ClientProcess(stack.client_environ(hasty), stack.root / "hasty") as process:
        process.run(f"from nnsight import LanguageModel; model = LanguageModel({MODEL!r})")
        before = executors(stack)
        process.start(SLEEP_60)
        running(stack, "hasty")
        wait_until(lambda: before - executors(stack), 1.0 + GONE_S, "the executor is gone")
        with pytest.raises(
            CellFailed, match="its limit of wall time is 1 s, set by the token hasty"
        ):
            process.wait()


def test_a_print_loop_ends_in_words_and_disturbs_nobody(
    stack: Stack, client: ClientProcess
) -> None:
    """Its lines until the limit come, it learns what went over and what that cost; others do not notice."""
    chatty = stack.token("chatty", limits={"log_lines": 40})
    with ClientProcess(stack.client_environ(chatty), stack.root / "chatty") as process:
        process.run(f"from nnsight import LanguageModel; model = LanguageModel({MODEL!r})")
        process.start("""
            from nnsight import CONFIG
            CONFIG.APP.REMOTE_LOGGING = True
            tracer = model.trace("Hello", remote=True)
            try:
                with tracer:
                    while True:
                        print("spam", flush=True)
            except Exception as error:
                report(error=type(error).__name__, text=str(error), meta=tracer.backend.meta)
        """)
        assert client.run(TRACE)["dimensions"] == 3
        told = process.wait()
        assert process.run(TRACE)["dimensions"] == 3
    assert told["error"] == "RemoteError"
    assert "its limit of printed lines is 40, set by the token chatty. Print less" in told["text"]
    assert told["output"].count("spam") == 40
    meta = told["meta"]
    assert meta["error"] == {
        "kind": "limit", "limit": "log_lines", "value": 40, "source": "the token chatty",
    }  # fmt: skip
    assert (meta["log_lines"], meta["log_bytes"], meta["result_bytes"]) == (40, 160, 0)
    assert (meta["limits"]["log_lines"], meta["limits"]["log_bytes"]) == (40, 1 << 20)
    assert {"runtime_s", "queued_s", "attempt", "cpu_s", "peak_rss_bytes"} <= set(meta)


@pytest.mark.parametrize(
    ("crash", "says"),
    [
        ("import os; os._exit(7)", "died 3 times"),
        ("import ctypes; ctypes.string_at(0)", "died 3 times"),
        ("x = torch.zeros(1 << 34)", "memory"),
    ],
    ids=["exit", "segfault", "memory"],
)
def test_a_crash_costs_its_own_request_alone(
    stack: Stack, local: ClientProcess, crash: str, says: str
) -> None:
    before = {each.pid for each in stack.processes("worker")}
    told = local.run(f"""
        tracer = model.trace("Hello", remote=True)
        try:
            with tracer:
                {crash}
                out = model.lm_head.output.save()
        except Exception as error:
            report(error=type(error).__name__, text=str(error), meta=tracer.backend.meta)
    """)
    assert told["error"] == "RemoteError"
    assert says in told["text"]
    costs = {"runtime_s", "cpu_s", "peak_rss_bytes", "log_lines", "limits", "error"}
    assert costs <= set(told["meta"])
    assert {each.pid for each in stack.processes("worker")} == before
    assert local.run(TRACE)["dimensions"] == 3


def test_bytes_that_are_no_request_are_an_error_of_their_sender(
    stack: Stack, raw: RawClient
) -> None:
    end = raw.ended(raw.send(b"this is not zstd", compress=True))
    assert (end.status, end.kind) == ("ERROR", "user")
    assert "cannot be read" in end.description
    assert stack.operator.workers("tiny")


def test_a_polling_loop_outlives_the_relay(stack: Stack, local: ClientProcess) -> None:
    """The loop catches connection errors itself, as any script that runs for days has to."""
    local.run("""
        import time
        with model.trace("Hello", remote=True, blocking=False) as tracer:
            time.sleep(3)
            out = model.lm_head.output.save()
    """)
    running(stack)
    local.start("""
        import httpx
        result, refused = None, 0
        while result is None:
            try:
                result = tracer.backend()
            except httpx.TransportError:
                refused += 1
            time.sleep(0.02)
        with here.trace("Hello"):
            expected = here.lm_head.output.save()
        report(equal=torch.equal(result["out"], expected), refused=refused, meta=tracer.backend.meta)
    """)
    stack.kill_relay()
    stack.start_relay()
    told = local.wait()
    assert told["equal"]
    assert told["refused"] > 0
    assert told["meta"]["attempt"] == 1, "a worker that is still there keeps its work"


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def leaver(
    stack: Stack, request: pytest.FixtureRequest
) -> Iterator[tuple[ClientProcess, RawClient]]:
    """A client that will be interrupted, and the same person's raw eyes."""
    name = request.node.name
    token = stack.token(name)
    with ClientProcess(stack.client_environ(token), stack.root / name) as process:
        process.run(f"from nnsight import LanguageModel; model = LanguageModel({MODEL!r})")
        yield process, RawClient(url=stack.url, token=token, model_key="")


def test_an_interrupted_running_request_finishes_and_its_result_is_kept(
    stack: Stack, leaver: tuple[ClientProcess, RawClient], request: pytest.FixtureRequest
) -> None:
    process, eyes = leaver
    process.start("""
        import time
        with model.trace("hello", remote=True):
            time.sleep(3)
            out = model.lm_head.output.save()
    """)
    request_id = running(stack, request.node.name)
    process.interrupt()
    assert process.process.wait(30) != 0
    end = eyes.ended(request_id)
    assert end.status == "COMPLETED"
    assert len(eyes.result(end)) > 1000


def test_an_interrupted_queued_request_is_cancelled_after_the_grace(
    stack: Stack,
    client: ClientProcess,
    leaver: tuple[ClientProcess, RawClient],
    request: pytest.FixtureRequest,
) -> None:
    process, eyes = leaver
    client.start(SLEEP_60)
    blocker = running(stack)
    process.start(TRACE)

    def waiting() -> str | None:
        mine = httpx.get(f"{stack.url}/api/requests", headers=eyes.headers).json()["requests"]
        return mine[0]["id"] if mine else None

    request_id = wait_until(waiting, 60, "the request is queued") or ""
    process.interrupt()
    assert process.process.wait(30) != 0
    end = eyes.ended(request_id)
    assert (end.status, end.kind) == ("ERROR", "cancelled")
    assert "connection closed" in end.description
    stack.operator.call("DELETE", f"/requests/{blocker}")
    with pytest.raises(CellFailed):
        client.wait()


# -- long transfers ----------------------------------------------------------------------------------------------------


def test_an_upload_that_outlasts_many_pings(stack: Stack, local: ClientProcess) -> None:
    """The client answers no ping while it uploads; the socket has to be there when it listens again."""
    stack.stop_relay()
    stack.start_relay(ws_ping_interval_s=0.2)
    stack.wait_warm()
    with Proxy(stack.port) as proxy:
        proxy.upload_bytes_per_s = 500_000
        told = local.run(f"""
            import time
            from nnsight.intervention.backends.remote import RemoteBackend
            load = torch.randint(0, 255, (2_000_000,), dtype=torch.uint8)
            backend = RemoteBackend(model.to_model_key(), host={proxy.url!r})
            began = time.monotonic()
            with model.trace("Hello", backend=backend):
                total = load.sum().save()
            report(right=int(total) == int(load.sum()), seconds=time.monotonic() - began)
        """)
    stack.stop_relay()
    stack.start_relay()
    assert told["right"]
    assert told["seconds"] > 15 * 0.2
    stack.wait_warm()


def test_a_result_of_100_mb(local: ClientProcess) -> None:
    told = local.run("""
        with model.trace("Hello", remote=True):
            big = (torch.arange(25_000_000, dtype=torch.int32) * 7919 % 1_000_003).save()
        report(equal=torch.equal(big, torch.arange(25_000_000, dtype=torch.int32) * 7919 % 1_000_003))
    """)
    assert told["equal"]


def test_every_request_is_in_the_books_once(stack: Stack) -> None:
    """Runs last: what the tests above did is accounted for."""
    wait_until(lambda: stack.operator.unfinished() == 0, 60, "all requests have ended")
    listed = stack.operator.get("/requests?limit=1000")["requests"]
    assert len(listed) > 20
    assert json.dumps(listed).count('"completed"') == 0
    assert {each["state"] for each in listed} == {"COMPLETED", "ERROR"}
