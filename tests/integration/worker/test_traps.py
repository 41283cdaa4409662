"""Traps that servers of nnsight are known to have fallen into, and the test that closes each.

| trap | closed by |
|---|---|
| a list, dict or set filled in a block comes back empty | `test_what_a_block_collects_comes_back`, `test_a_list_grows_over_a_loop_of_traces`, `test_fidelity.test_a_captured_list_comes_back` |
| a name of an earlier trace comes back, or overwrites a newer one | `test_only_new_names_come_back` |
| two users' files have one name, and one runs the other's code | `test_two_users_with_one_file_name` |
| the server's transformers is one that nnsight cannot read | `unit/worker/test_versions` |
| weights that a request changed are seen by the next | `test_fidelity.test_tampering_with_weights_is_gone_with_the_request` |
| `requires_grad`, dtype, autocast, builtins, modules, environment: likewise | `test_nothing_that_a_request_changes_is_seen_by_the_next` |
| code runs while a request is read, outside the walls | `test_reading_a_request_runs_its_code_inside_the_walls` |
| the attention or the adapter of a request is any name of the Hub | `test_outcomes.test_a_setting_outside_the_list_is_refused` |
| the attention of the last request stays | `test_fidelity.test_attention_is_what_the_client_resolved` |
| gradients are always on, or always off | `test_gradients` |
| one trace at a time, for one model object | `test_requests_at_the_same_time` |
| `.save()` on what is no tensor | `test_anything_can_be_saved` |
| a saved view drags its whole storage along | `test_fidelity.test_a_saved_view_carries_only_what_it_shows` |
| prints and warnings stay on the server | `test_outcomes.test_prints_and_warnings_come_as_lines` |
| a client asks for more than the machine has | `test_outcomes.test_memory_that_runs_out`, `.test_time_runs_out` |
| an interrupt at the client costs a result, or a GPU | `acceptance/test_client.test_an_interrupted_*` |
| tied weights come apart; buffers outside the checkpoint are missing | `test_parameters_and_buffers_are_those_of_a_plain_load` |
| every request draws the same random numbers | `test_fidelity.test_seeds_differ_between_requests_and_are_told` |
| `main`, null and a commit are three models, or one | `test_which_deployment_answers_a_revision` |
"""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

import asyncio
import linecache
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nnsight
import pytest
import torch
from nnsight.intervention.backends.remote import RemoteBackend
from nnsight.tracing.globals import BLOCKS, SOURCES
from transformers import AutoModelForCausalLM

from edif_hpc.domain.deployment import Deployment, find_deployment, parse_model_key
from edif_hpc.errors import NotFound
from edif_hpc.worker.engine.values import FailureKind, Job, Limits
from tests.integration.worker.conftest import KEY, Service, client, serving
from tests.integration.worker.test_fidelity import equal, generation, invokes, steps, trace
from tests.integration.worker.test_outcomes import still_serves


class Through(RemoteBackend):
    """The client's own remote backend, with our engine where the network would be."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(KEY, env=service.model._remoteable_get_env())
        self.service, self.loop = service, loop
        self.sent: list[dict[str, Any]] = []

    def request(self, request: Any, tracer: Any) -> Any:
        job = Job(
            request_id="through",
            attempt=1,
            blob=self._serialize(tracer),
            compress=self.compress,
            env=request.env,
            limits=Limits(wall_s=60),
        )
        reply = asyncio.run_coroutine_threadsafe(self.service.run(job), self.loop).result(60)
        self.sent.append(reply.values)
        return self.sent[-1]


async def through(service: Service, block: Callable[..., Any]) -> tuple[Any, list[dict[str, Any]]]:
    """Run a function whose traces all go to the engine; return its value and what each brought back."""
    backend = Through(service, asyncio.get_running_loop())
    return await asyncio.to_thread(block, service.model, backend), backend.sent


# ---------------------------------------------------------------- what comes back


async def test_what_a_block_collects_comes_back(service: Service) -> None:
    def collecting(model: Any, backend: Any) -> dict[str, Any]:
        plain: list[Any] = []
        deep: dict[str, Any] = {"a": {"b": ([],)}}
        names: set[str] = set()
        both = ["before", None]
        unfilled: list[Any] = []
        with model.session(backend=backend):
            with model.trace("the first"):
                plain.append(model.transformer.h[0].output.save())
            with model.trace("the second"):
                deep["a"]["b"][0].append(model.transformer.h[1].output.save())
                both[1] = model.lm_head.output.save()
            names.add(nnsight.save("a word"))
            untouched = unfilled
        return {"plain": plain, "deep": deep, "names": names, "both": both, "unfilled": unfilled}

    found, (sent,) = await through(service, collecting)
    assert len(found["plain"]) == 1
    assert torch.is_tensor(found["deep"]["a"]["b"][0][0])
    assert found["names"] == {"a word"}
    assert found["both"][0] == "before"
    assert torch.is_tensor(found["both"][1])
    assert "unfilled" not in sent


async def test_a_list_grows_over_a_loop_of_traces(service: Service) -> None:
    def growing(model: Any, backend: Any = None) -> list[Any]:
        found: list[Any] = []
        for prompt in ("one", "two words", "and three words"):
            with model.trace(prompt, backend=backend):
                found.append(model.transformer.h[0].output.save())
        return found

    found, sent = await through(service, growing)
    assert len(sent) == 3
    assert equal(found, [each.detach() for each in growing(service.model)])


async def test_only_new_names_come_back(service: Service) -> None:
    def renaming(model: Any, backend: Any) -> tuple[Any, ...]:
        with model.trace("an earlier one", backend=backend):
            old = model.transformer.h[0].output.save()
            result = model.transformer.h[0].output[0, 0].save()
        mine = old
        seen = [old]
        with model.trace("a later one", backend=backend):
            shift = old.mean() + len(seen)
            result = (model.transformer.h[1].output[0, 0] + shift).save()
        return old is mine, seen[0] is old, result

    (kept, listed, result), sent = await through(service, renaming)
    assert [set(each) for each in sent] == [{"old", "result"}, {"result"}]
    assert kept
    assert listed
    assert torch.equal(result, sent[1]["result"])


async def test_anything_can_be_saved(service: Service) -> None:
    def saving(model: Any, **where: Any) -> None:
        with model.trace("not only tensors", **where):
            shape = tuple(model.transformer.h[0].output.shape).save()
            names = ["a", "b"].save()
            number = nnsight.save(7)
            nothing = nnsight.save(None)

    values = (await service.send(saving)).values
    assert values["shape"][-1] == 64
    assert values["names"] == ["a", "b"]
    assert values["number"] == 7
    assert values["nothing"] is None


# ---------------------------------------------------------------- one user and the next


def in_a_notebook(body: str) -> Callable[..., None]:
    """A block in a file named like everybody's; the client's own caches are those of a new process."""
    lines = [f"    {line}\n" for line in body.splitlines()]
    source = "".join(["def cell(model, **where):\n", *lines])
    name = "<ipython-input-1>"
    SOURCES.clear()
    BLOCKS.clear()
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope: dict[str, Any] = {}
    exec(compile(source, name, "exec"), scope)
    cell: Callable[..., None] = scope["cell"]
    return cell


CELL = """\
with model.session(**where):
    with model.trace("the same words"):
        x = (model.transformer.h[0].output * {scale}).sum().save()
    who = "{name}".save()
"""


async def test_two_users_with_one_file_name(service: Service) -> None:
    told = []
    for name, scale in (("ada", 0), ("bob", 1), ("ada", 0)):
        cell = in_a_notebook(CELL.format(name=name, scale=scale))
        values = (await service.send(cell)).values
        told.append((values["who"], bool(values["x"] != 0)))
    assert told == [("ada", False), ("bob", True), ("ada", False)]
    failing = in_a_notebook("with model.session(**where):\n    bob_is_wrong = 1 / 0\n")
    assert "bob_is_wrong = 1 / 0" in (await service.send(failing)).failed.message


def state(model: Any, **where: Any) -> None:
    """All that a request could leave to the next, as far as one can ask for it."""
    with model.session(**where):
        import builtins
        import json
        import os
        import sys
        import warnings
        from pathlib import Path

        told = nnsight.save(
            {
                "dtype": str(torch.get_default_dtype()),
                "autocast": torch.is_autocast_enabled("cpu"),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "modes": torch._C._len_torch_dispatch_stack(),
                "threads": torch.get_num_threads(),
                "flags": sorted({p.requires_grad for p in model._module.parameters()}),
                "slopes": sum(p.grad is not None for p in model._module.parameters()),
                "training": model._module.training,
                "hooks": sum(len(m._forward_hooks) for m in model._module.modules()),
                "weights": float(sum(p.detach().abs().sum() for p in model._module.parameters())),
                "buffers": float(sum(b.double().abs().sum() for b in model._module.buffers())),
                "config": json.dumps(model._module.config.to_dict(), sort_keys=True, default=str),
                "attention": model.attn_implementation,
                "side": model.tokenizer.padding_side,
                "builtin": max(1, 2),
                "own": hasattr(builtins, "left_behind"),
                "modules": "left_behind" in sys.modules,
                "path": [each for each in sys.path if "left" in each],
                "environment": os.environ.get("LEFT_BEHIND"),
                "filters": [each for each in warnings.filters if each[1] is not None],
                "json": json.dumps([1]),
                "tensor": hasattr(torch.Tensor, "left_behind"),
                "files": [str(each) for each in Path().iterdir()],
            }
        )


def vandalism(model: Any, **where: Any) -> None:
    with model.session(**where):
        import builtins
        import json
        import os
        import sys
        import types
        import warnings
        from pathlib import Path

        torch.set_default_dtype(torch.float64)
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)
        for parameter in model._module.parameters():
            parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
            parameter.requires_grad_(False)
            parameter.data.mul_(2)
        for buffer in model._module.buffers():
            buffer.zero_()
        model._module.train()
        model._module.transformer.h[0].register_forward_hook(lambda *_: None)
        model._module.config.n_head = 7
        model._module.set_attn_implementation("eager")
        model.tokenizer.padding_side = "weird"
        builtins.max = lambda *_: 42
        builtins.left_behind = 1
        sys.modules["left_behind"] = types.ModuleType("left_behind")
        sys.path.insert(0, "/left")
        os.environ["LEFT_BEHIND"] = "1"
        warnings.filterwarnings("error", message="left")
        json.dumps = lambda *_, **__: "left"
        torch.Tensor.left_behind = 1
        Path("left_behind").write_text("x")
        done = nnsight.save(1)


async def test_nothing_that_a_request_changes_is_seen_by_the_next(service: Service) -> None:
    before = (await service.send(state)).values["told"]
    for _ in range(2):
        assert (await service.send(vandalism)).values["done"] == 1
    for _ in range(2):
        assert (await service.send(state)).values["told"] == before
    assert before["dtype"] == "torch.float32"
    assert before["flags"] == [True]
    assert equal((await service.send(trace)).values["logits"], trace(service.model)["logits"])


class Reduced:
    """Runs a call while it is read."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


async def test_reading_a_request_runs_its_code_inside_the_walls(service: Service) -> None:
    where_read = Reduced(os.getcwd)
    fatal = Reduced(os._exit, 7)

    def carrying(model: Any, **where: Any) -> None:
        with model.session(**where):
            place = str(where_read).save()

    def ending(model: Any, **where: Any) -> None:
        with model.session(**where):
            place = str(fatal).save()

    place = Path((await service.send(carrying)).values["place"])
    assert place.name.startswith("executor-")
    failed = (await service.send(ending)).failed
    assert failed.kind is FailureKind.CRASH
    assert "status 7" in failed.message
    await still_serves(service)


async def test_requests_at_the_same_time(service: Service) -> None:
    blocks = [trace, invokes, steps, generation] * 2
    local = [block(service.model) for block in blocks]
    jobs = [service.job(block) for block in blocks]
    replies = await asyncio.gather(*map(service.run, jobs))
    for here, reply in zip(local, replies, strict=True):
        there = reply.values
        assert all(equal(there[name], value) for name, value in here.items())


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("shape", ["tiny_gpt2", "tiny_llama"])
async def test_parameters_and_buffers_are_those_of_a_plain_load(
    shape: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    def inventory(module: Any) -> dict[str, Any]:
        """Every parameter and buffer by each of its names, and which names are one tensor."""
        named = [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
        ties: dict[int, list[str]] = {}
        for name, tensor in named:
            ties.setdefault(id(tensor), []).append(name)
        return {
            "values": {name: tensor.detach().clone() for name, tensor in named},
            "flags": {name: tensor.requires_grad for name, tensor in named},
            "ties": sorted(ties.values()),
            "stored": sorted(module.state_dict()),
        }

    def taking(model: Any, **where: Any) -> None:
        with model.session(**where):
            taken = inventory(model._module).save()

    folder: Path = request.getfixturevalue(shape)
    plain = inventory(AutoModelForCausalLM.from_pretrained(folder))
    async with serving(client(folder), folder, tmp_path / "engine") as own:
        served = (await own.send(taking)).values["taken"]
    assert served["ties"] == plain["ties"]
    assert any(len(names) > 1 for names in plain["ties"]), "the model has no ties to lose"
    assert served["flags"] == plain["flags"]
    assert served["stored"] == plain["stored"]
    assert served["values"].keys() == plain["values"].keys()
    for name, tensor in plain["values"].items():
        assert equal(served["values"][name], tensor), name
    if shape == "tiny_llama":
        assert set(plain["values"]) > set(plain["stored"]), "no buffer lies outside the checkpoint"


COMMIT = "438d1ef025448aeb0f5ac0d1cbf3f4c7c0ffee00"


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ("null", "plain"),
        ('"main"', "plain"),
        ('"v2"', "second"),
        (f'"{COMMIT}"', None),
        ('"dev"', None),
    ],
)
def test_which_deployment_answers_a_revision(asked: str, answers: str | None) -> None:
    """`main` and null are the head of the default branch; a commit is served if it was deployed as one."""
    deployed = [
        Deployment(name="plain", repo_id="edif/tiny", revision=None, task="text-generation"),
        Deployment(name="second", repo_id="edif/tiny", revision="v2", task="text-generation"),
    ]
    key = parse_model_key(KEY.replace("null", asked))
    if answers is not None:
        assert find_deployment(key, deployed).name == answers
        return
    with pytest.raises(NotFound) as refused:
        find_deployment(key, deployed)
    told = str(refused.value)
    assert f"edif/tiny (task text-generation, revision {asked[1:-1]}) is not deployed here" in told
    assert (
        "edif/tiny (task text-generation), edif/tiny (task text-generation, revision v2)" in told
    )
    pinned = Deployment(
        name="pinned", repo_id="edif/tiny", revision=COMMIT, task="text-generation"
    )
    if asked == f'"{COMMIT}"':
        assert find_deployment(key, [*deployed, pinned]).name == "pinned"
