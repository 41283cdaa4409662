"""Every limit of a request, reached in a real engine: how it ends, what it is told, and what it cost."""

# ruff: noqa: F841, T201 - what a block binds or prints is what the client gets back

from __future__ import annotations

from typing import Any

import nnsight
import pytest
import torch

from edif_hpc.worker.engine.values import MIB, FailureKind, Limits
from tests.integration.worker.conftest import Block, Reply, Service

COST = {"runtime_s", "cpu_s", "peak_rss_bytes", "log_lines", "log_bytes", "result_bytes"}
TOKEN = "the token ada"


def few(**limits: Any) -> Limits:
    return Limits(**({"wall_s": 60.0, "sources": dict.fromkeys(limits, TOKEN)} | limits))


def plain(model: Any, **where: Any) -> None:
    with model.trace("Hello", **where):
        logits = model.lm_head.output.save()
        print("seen")


async def ended(service: Service, block: Block, limits: Limits, name: str) -> Reply:
    """How it ends: the error names the limit, its value and who set it; and the next request is none the worse."""
    reply = await service.send(block, limits=limits)
    error = reply.failed.meta["error"]
    assert isinstance(error, dict), reply.failed
    facts = (error["limit"], error["value"], error["source"])
    assert facts == (name, getattr(limits, name), TOKEN)
    assert f"set by {TOKEN}" in reply.failed.message
    assert "ask your operator for a higher limit" in reply.failed.message
    assert reply.failed.meta.keys() >= COST
    assert (await service.send(plain)).saved
    return reply


# ---------------------------------------------------------------- what is printed


def looping(model: Any, **where: Any) -> None:
    with model.session(**where):
        number = 0
        while True:
            print("line", number)
            number += 1


def stubborn(model: Any, **where: Any) -> None:
    """It catches whatever is raised, and prints in a thread of its own."""
    with model.session(**where):
        import contextlib
        import threading

        def printing() -> None:
            while True:
                with contextlib.suppress(BaseException):  # as hard to stop as it gets
                    print("again")

        threading.Thread(target=printing).start()
        printing()


def quiet_library(model: Any, **where: Any) -> None:
    with model.session(**where):
        import warnings

        warnings.simplefilter("always")
        while True:
            warnings.warn("once more", stacklevel=1)


@pytest.mark.parametrize("block", [looping, stubborn, quiet_library])
async def test_lines(service: Service, block: Block) -> None:
    reply = await ended(service, block, few(log_lines=20), "log_lines")
    assert reply.failed.kind is FailureKind.LIMIT
    assert "what it printed until then was delivered" in reply.failed.message
    assert len(reply.printed) == reply.failed.meta["log_lines"] == 20
    if block is looping:
        assert reply.printed == [f"line {number}" for number in range(20)]
        assert reply.failed.meta["log_bytes"] == sum(map(len, reply.printed))


async def test_printed_text(service: Service) -> None:
    def wordy(model: Any, **where: Any) -> None:
        with model.session(**where):
            print("short")
            print("x" * 1_000_000)

    reply = await ended(service, wordy, few(log_bytes=100_000), "log_bytes")
    assert reply.failed.kind is FailureKind.LIMIT
    assert reply.printed[0] == "short"
    assert sum(map(len, reply.printed)) <= 100_000


async def test_lines_past_our_own_code(service: Service) -> None:
    """A request that writes frames to the socket itself is counted on the other side."""

    def forging(model: Any, **where: Any) -> None:
        with model.session(**where):
            import os

            import msgpack

            body = msgpack.packb(["Log", {"text": "forged"}])
            frame = len(body).to_bytes(4, "big") + body
            while True:
                os.write(3, frame)

    reply = await ended(service, forging, few(log_lines=20), "log_lines")
    assert reply.failed.kind is FailureKind.LIMIT
    assert reply.printed == ["forged"] * 20


# ---------------------------------------------------------------- what is saved


async def test_saved_tensors(service: Service) -> None:
    def scattered(model: Any, **where: Any) -> None:
        with model.session(**where):
            many = nnsight.save([torch.ones(1) for _ in range(30)])

    reply = await ended(service, scattered, few(saved_tensors=20), "saved_tensors")
    assert reply.failed.kind is FailureKind.LIMIT
    assert "saves 30 tensors" in reply.failed.message
    assert "torch.stack" in reply.failed.message
    assert reply.failed.meta["saved_tensors"] == 30


@pytest.mark.parametrize("compress", [True, False])
async def test_the_results_size(service: Service, compress: bool) -> None:
    def large(model: Any, **where: Any) -> None:
        with model.session(**where):
            big = torch.randn(MIB).save()

    limits = few(result_bytes=3 * MIB)
    reply = await service.send(large, compress=compress, limits=limits)
    assert reply.failed.kind is FailureKind.LIMIT
    assert "the result's size is 3 MiB, set by the token ada. Save less" in reply.failed.message


# ---------------------------------------------------------------- files


async def test_a_file_may_be_larger_than_the_result(service: Service) -> None:
    def writing(model: Any, **where: Any) -> None:
        with model.session(**where):
            from pathlib import Path

            written = nnsight.save(Path("some").write_bytes(bytes(3 * MIB)))

    reply = await service.send(writing, limits=few(result_bytes=MIB, scratch_bytes=8 * MIB))
    assert reply.values["written"] == 3 * MIB


async def test_a_file_that_is_too_large(service: Service) -> None:
    def writing(model: Any, **where: Any) -> None:
        with model.session(**where):
            from pathlib import Path

            Path("some").write_bytes(bytes(9 * MIB))

    limits = few(result_bytes=MIB, scratch_bytes=8 * MIB)
    reply = await ended(service, writing, limits, "scratch_bytes")
    assert reply.failed.kind is FailureKind.LIMIT
    assert "temporary files is 8 MiB" in reply.failed.message


# ---------------------------------------------------------------- time and memory


async def test_time(service: Service) -> None:
    def endless(model: Any, **where: Any) -> None:
        with model.session(**where):
            print("begun")
            while True:
                pass

    reply = await ended(service, endless, few(wall_s=1.5), "wall_s")
    assert reply.failed.kind is FailureKind.TIMEOUT
    assert "wall time is 1.5 s" in reply.failed.message
    assert "split it" in reply.failed.message
    cpu_s, peak = reply.failed.meta["cpu_s"], reply.failed.meta["peak_rss_bytes"]
    assert isinstance(cpu_s, float)
    assert cpu_s > 0.0
    assert isinstance(peak, int)
    assert peak > MIB
    assert reply.printed == ["begun"]


async def test_memory(service: Service) -> None:
    def greedy(model: Any, **where: Any) -> None:
        with model.session(**where):
            first = torch.ones(1000, 1000).save()
            parts = nnsight.save([torch.ones(3000, 1000)])
            too_much = torch.zeros(1 << 30)

    reply = await ended(service, greedy, few(memory_bytes=256 * MIB), "memory_bytes")
    assert reply.failed.kind is FailureKind.OOM
    assert "too_much = torch.zeros(1 << 30)" in reply.failed.message
    assert "(it asked for 4 GiB at once)" in reply.failed.message
    assert "a smaller batch" in reply.failed.message
    found = reply.failed.meta["largest_saved"]
    assert isinstance(found, list)
    named = [(each["name"], each["shape"]) for each in found if isinstance(each, dict)]
    assert named == [("parts", [3000, 1000]), ("first", [1000, 1000])]
    assert "parts float32 [3000, 1000]" in reply.failed.message


# ---------------------------------------------------------------- what it costs


async def test_the_cost_of_a_success(service: Service) -> None:
    reply = await service.send(plain)
    meta = reply.saved.meta
    assert meta.keys() >= COST | {"saved_tensors", "max_mem_by_gpu", "seed"}
    assert meta["result_bytes"] == reply.saved.size > 0
    assert (meta["saved_tensors"], meta["log_lines"], meta["log_bytes"]) == (1, 1, len("seen"))
    assert meta["max_mem_by_gpu"] == {}


async def test_the_cost_of_an_error_of_the_researchers(service: Service) -> None:
    def failing(model: Any, **where: Any) -> None:
        with model.session(**where):
            print("one")
            raise ValueError("mine")

    failed = (await service.send(failing)).failed
    assert failed.kind is FailureKind.USER
    assert failed.meta.keys() >= COST | {"saved_tensors"}
    assert "error" not in failed.meta
    assert failed.meta["log_lines"] == 1


async def test_the_cost_of_a_crash(service: Service) -> None:
    def crashing(model: Any, **where: Any) -> None:
        with model.session(**where):
            print("before")
            import os

            os._exit(7)

    failed = (await service.send(crashing)).failed
    assert failed.kind is FailureKind.CRASH
    assert failed.meta.keys() >= COST
    assert failed.meta["log_lines"] == 1
