"""Weights that executors share, tried on the CPU: memory that all of them can write, restored after each.

It shows that the order holds and that restoring does. It shows nothing of a GPU.
"""

# ruff: noqa: F841 - what a block binds is what the client gets back

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edif_hpc.testing.wait import wait_until_async
from edif_hpc.worker.engine.values import FailureKind, Level
from tests.integration.worker.conftest import Reply, Service, serving
from tests.integration.worker.test_fidelity import trace

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
async def shared(
    gpt2: Any, tiny_gpt2: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Service]:
    scratch = tmp_path_factory.mktemp("shared")
    async with serving(gpt2, tiny_gpt2, scratch, device="cpu:0", weights="shared") as service:
        yield service


def values(model: Any, **where: Any) -> None:
    with model.trace("two of a kind", **where):
        logits = model.lm_head.output.save()
        tied = (model.lm_head.weight is model.transformer.wte.weight).save()


def everything(model: Any, **where: Any) -> None:
    with model.session(**where):
        kept = {name: each.clone() for name, each in model._module.state_dict().items()}
        kept = kept.save()


async def test_it_is_told(shared: Service) -> None:
    told = shared.info
    assert (told.weights, told.unverified) == ("shared", True), told.isolation.missing
    assert not any("shared" in each for each in told.isolation.missing)


async def test_numbers_are_those_of_a_local_run(shared: Service, gpt2: Any) -> None:
    reply = await shared.send(values)
    with gpt2.trace("two of a kind"):
        logits = gpt2.lm_head.output.save()
    torch.testing.assert_close(reply.values["logits"], logits, rtol=1e-5, atol=1e-6)
    assert reply.values["tied"]
    assert reply.saved.meta["restored_tensors"] == 0
    assert reply.saved.meta["restore_s"] > 0


async def test_an_edit_is_gone_for_the_next_and_charged_to_its_author(shared: Service) -> None:
    def editing(model: Any, **where: Any) -> None:
        with model.session(**where):
            import torch

            module = model._module
            with torch.no_grad():
                module.transformer.wte.weight.mul_(2)  # the head is tied to it
                rows = module.transformer.h[0].mlp.c_fc.weight  # two rows of it change places
                rows.copy_(rows[torch.arange(rows.shape[0]).flip(0)])
                module.transformer.ln_f.bias.view(-1)[1:3].fill_(7)  # through a view
            seen = module.lm_head.weight.sum().item().save()

    before = (await shared.send(everything)).values["kept"]
    edited = await shared.send(editing)
    after = (await shared.send(everything)).values["kept"]
    assert edited.values["seen"] != before["lm_head.weight"].sum().item()
    assert edited.saved.meta["restored_tensors"] == 3
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


async def test_all_of_it_is_written_by_others_until_it_is_restored(shared: Service) -> None:
    """The stand-in really shares: without the holder's work the next one would see it."""

    def everything_zero(model: Any, **where: Any) -> None:
        with model.session(**where):
            for each in model._module.parameters():
                each.data.zero_()
            left = sum(each.abs().sum().item() for each in model._module.parameters()).save()

    gone = await shared.send(everything_zero)
    assert gone.values["left"] == 0
    assert gone.saved.meta["restored_tensors"] > 10
    assert (await shared.send(values)).saved.meta["restored_tensors"] == 0


async def test_who_is_killed_in_the_middle_of_a_write_leaves_nothing(shared: Service) -> None:
    def writing(model: Any, **where: Any) -> None:
        with model.session(**where):
            weight = model._module.lm_head.weight.data
            weight.add_(1)
            print("writing")  # noqa: T201 - the block says that it is there
            while True:
                weight.add_(1)

    engine, lines = shared.engine, []
    before = (await shared.send(values)).values["logits"]
    run = asyncio.create_task(engine.run(shared.job(writing), lines.append))
    await wait_until_async(lambda: lines, DEADLINE_S, "it writes")
    engine._seats[min(engine._seats)].kill()
    killed = Reply(outcome=await run, printed=lines)
    assert killed.failed.kind is FailureKind.CRASH
    assert killed.failed.meta["restored_tensors"] == 1
    assert torch.equal((await shared.send(values)).values["logits"], before)


async def test_the_next_is_ready_beside_the_one_that_runs_and_waits_for_its_end(
    shared: Service,
) -> None:
    def waiting(model: Any, **where: Any) -> None:
        with model.session(**where):
            while True:
                pass

    engine = shared.engine
    jobs = [asyncio.create_task(shared.run(shared.job(each))) for each in (waiting, values)]
    await wait_until_async(
        lambda: engine._line.held_up and len(engine._line.ready) == 1, DEADLINE_S, "one is ready"
    )
    assert len(engine._seats) == 2
    assert not jobs[1].done()
    engine._seats[min(engine._seats)].kill()
    crashed, served = await asyncio.gather(*jobs)
    assert crashed.failed.kind is FailureKind.CRASH
    assert served.saved.size > 0


async def test_the_end_of_the_next_leaves_what_the_one_that_runs_has_changed(
    shared: Service,
) -> None:
    def editing(model: Any, **where: Any) -> None:
        with model.session(**where):
            import signal

            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            weight = model._module.lm_head.weight
            weight.data.fill_(3)
            print("edited")  # noqa: T201 - the block says that it is there
            signal.sigwait([signal.SIGUSR1])
            kept = bool((weight == 3).all()).save()

    engine, lines = shared.engine, []
    run = asyncio.create_task(engine.run(shared.job(editing), lines.append))
    await wait_until_async(
        lambda: lines and engine._line.ready, DEADLINE_S, "one runs, one is ready"
    )
    [following] = engine._line.ready
    following.kill()
    await following.exited
    running = min(engine._seats.values(), key=lambda seat: seat.number)
    assert running._pidfd is not None
    signal.pidfd_send_signal(running._pidfd, signal.SIGUSR1)
    reply = Reply(outcome=await run, printed=lines)
    assert reply.values["kept"]
    assert reply.saved.meta["restored_tensors"] == 1


async def test_many_jobs_are_served_one_after_the_other(shared: Service) -> None:
    replies = await asyncio.gather(*(shared.run(shared.job(trace)) for _ in range(4)))
    assert all(each.saved.size > 0 for each in replies)


async def test_without_walls_each_has_a_copy_and_it_is_said_why(
    gpt2: Any, tiny_gpt2: Path, tmp_path: Path
) -> None:
    how = {"device": "cpu:0", "weights": "shared", "ceiling": Level.PROCESS}
    async with serving(gpt2, tiny_gpt2, tmp_path / "engine", **how) as service:
        assert service.info.weights == "private"
        assert "shared weights: at the level process" in service.info.isolation.missing[-1]
        assert (await service.send(trace)).saved.size > 0


async def test_without_namespaces_they_are_shared_as_well(
    gpt2: Any, tiny_gpt2: Path, tmp_path: Path
) -> None:
    how = {"device": "cpu:0", "weights": "shared", "ceiling": Level.NO_NAMESPACES}
    async with serving(gpt2, tiny_gpt2, tmp_path / "engine", **how) as service:
        if service.info.isolation.level is Level.NO_NAMESPACES:
            assert service.info.weights == "shared"
        before, after = [(await service.send(values)).values["logits"] for _ in range(2)]
        assert torch.equal(before, after)


async def test_the_engine_dies_with_the_holder(gpt2: Any, tiny_gpt2: Path, tmp_path: Path) -> None:
    how = {"device": "cpu:0", "weights": "shared"}
    async with serving(gpt2, tiny_gpt2, tmp_path / "engine", **how) as service:
        os.kill(_holder(tmp_path / "engine"), signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_S):
            reason = await asyncio.shield(service.engine.died)
        assert "the process that held the weights ended" in reason
        reply = await service.send(trace)
        assert reply.failed.kind is FailureKind.ENGINE


def _holder(folder: Path) -> int:
    """The holder of the engine in this folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            command = (each / "cmdline").read_bytes()
            if (
                b"weights.holder" in command
                and str(folder).encode() in (each / "environ").read_bytes()
            ):
                found.append(int(each.name))
        except OSError:
            continue
    [pid] = found
    return pid
