"""One request, from its blob to its result, in the executor that is for it alone.

All random generators are set by the seed that comes along, because all copies of the zygote would otherwise draw the same
numbers. The request is restored, executed (`fidelity`) and written (`saves`) within its limits, and the answer tells what it
used and, if memory ran out, what is known of that (`scarce`).

A line too many ends the process from within `print`; every other end comes back here.
"""

from __future__ import annotations

import linecache
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import torch
from nnsight.tracing.globals import BLOCKS, SOURCES

from edif_hpc.domain.limits import Limits, limits_of, overrun
from edif_hpc.domain.request import kind_of
from edif_hpc.errors import EdifError, OverLimit, TooLarge
from edif_hpc.worker.engine.house import House
from edif_hpc.worker.engine.messages import Broken, Done, Log, Run, Written
from edif_hpc.worker.engine.model import device as devices
from edif_hpc.worker.engine.protocol import FROM_EXECUTOR_BYTES, encode
from edif_hpc.worker.engine.request import advice, classes, fidelity, saves, scarce
from edif_hpc.worker.engine.request.console import Allowance, Meter
from edif_hpc.worker.engine.request.voice import MUTE, Speaker
from edif_hpc.worker.engine.values import INLINE_BYTES, FailureKind, Plain
from edif_hpc.worker.engine.walls import memory

#: Kept back from the request, so that its failure for want of memory can still be told.
RESERVE_BYTES = 64 * 1024 * 1024
#: What a rehearsal may use.
REHEARSED = Limits(result_bytes=INLINE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a request has no result, and what `meta` tells of it."""

    kind: FailureKind
    message: str
    lacked_gradients: bool = False
    meta: dict[str, Plain] = field(default_factory=dict)


def rehearse(house: House, key: str, result_fd: int) -> None:
    """Answer the self-test of a model key for the side effects, to nobody, and forget that it was."""
    run = Run(
        blob=house.selftests[key],
        compress=True,
        env={},
        model_key=key,
        seed=0,
        gradients=False,
        limits=REHEARSED.numbers(),
    )
    memory.data_bytes()
    encode(answer(house, run, [], MUTE, result_fd), FROM_EXECUTOR_BYTES)
    for console in house.consoles:
        console.connect(None)
    SOURCES.clear()
    BLOCKS.clear()
    linecache.clearcache()


def answer(
    house: House, run: Run, fds: Sequence[int], voice: Speaker, result_fd: int
) -> Done | Broken:
    """Run a request to its end; LOG lines and the progress of the result go out by `voice`."""
    attempt = _Attempt(house, run, voice, result_fd)
    return attempt.answer(attempt.run_to_end(fds))


def limit(run: Run) -> None:
    """Limit what the request may use of memory and disk."""
    limits = limits_of(run.limits, run.limit_sources)
    most = memory.data_bytes() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most + RESERVE_BYTES))
    largest = max(limits.result_bytes, limits.scratch_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


class _Attempt:
    """A request, what it is allowed, and what is known of it so far."""

    def __init__(self, house: House, run: Run, voice: Speaker, result_fd: int) -> None:
        self._house, self._run, self._voice = house, run, voice
        self._limits = limits_of(run.limits, run.limit_sources)
        self._began_cpu_s = time.process_time()
        self._scarcity = scarce.Scarcity()
        self._store = saves.Store(
            result_fd,
            inline_bytes=INLINE_BYTES,
            limits=self._limits,
            report=lambda size: voice.say(Written(size=size)),
        )
        self._meta: dict[str, Plain] = {
            "seed": run.seed,
            "model_key": run.model_key,
            "isolation": str(house.jail.layers.level),
            "threads": house.threads,
        }
        for each in house.devices:
            each.begin(self._limits.gpu_memory_bytes)
        self._began_bytes = [each.peak_bytes() for each in house.devices]

    def run_to_end(self, fds: Sequence[int]) -> Failure | None:
        """Run the request and write its result; return why it failed, if it did."""
        _reseed(self._run.seed)
        allowance = Allowance(
            Meter(self._limits), lambda text: self._voice.say(Log(text=text)), self._too_much_said
        )
        for console in self._house.consoles:
            console.connect(allowance.line)
        failure = self._attempt(fds) or self._took_too_much()
        for console in self._house.consoles:
            console.finish()
        return failure

    def answer(self, failure: Failure | None) -> Done | Broken:
        """The last word, with what was used."""
        meta = self._meta | self._used()
        if failure is None:
            return Done(inline=self._store.inline, size=self._store.size, meta=meta)
        return Broken(
            kind=str(failure.kind),
            message=failure.message,
            lacked_gradients=failure.lacked_gradients,
            meta=meta | failure.meta,
        )

    def _too_much_said(self, over: OverLimit) -> NoReturn:
        self._voice.end(self.answer(_over(over)))

    def _used(self) -> dict[str, Plain]:
        peaks: dict[str, Plain] = {
            str(index): each.peak_bytes() for index, each in enumerate(self._house.devices)
        }
        return {
            "max_mem_by_gpu": peaks,
            "saved_tensors": self._store.tensors,
            "cpu_s": round(time.process_time() - self._began_cpu_s, 6),
            "peak_rss_bytes": _peak_bytes(),
        }

    def _took_too_much(self) -> Failure | None:
        """What torch was told to keep to, code can take back; then it is noticed here."""
        most = self._limits.gpu_memory_bytes
        for index, (each, began) in enumerate(
            zip(self._house.devices, self._began_bytes, strict=True)
        ):
            took = each.peak_bytes() - began
            if most is not None and took > most:
                happened = f"the request took {took:,} bytes of GPU {index}"
                return _over(overrun(self._limits, "gpu_memory_bytes", happened))
        return None

    def _attempt(self, fds: Sequence[int]) -> Failure | None:
        house, run, gradients = self._house, self._run, self._run.gradients
        try:
            blob = run.blob if run.blob is not None else _read(fds[0])
            payload = fidelity.unpack(blob, compress=run.compress)
            task = house.task(run.model_key)
            model = house.models[task]
            if task in house.random_weights:
                self._meta["random_weights"] = [*house.random_weights[task]]
            self._meta |= fidelity.apply_env(model, run.env, house.adapters)
            tracer = fidelity.restore(model, payload)
            sent = classes.sent()
            gradients = (
                gradients or task in house.graded or fidelity.wants_gradients(payload, tracer)
            )
            self._meta["gradients"] = gradients
            saved = fidelity.execute(model, tracer, gradients=gradients, failed=self._passing)
            saves.write(saved, self._store, compress=run.compress, sent=sent)
        except OverLimit as over:
            return _over(over)
        except TooLarge as error:
            return Failure(kind=FailureKind.LIMIT, message=str(error))
        except EdifError as error:
            return Failure(kind=FailureKind.USER, message=str(error))
        except BaseException as error:  # noqa: BLE001 - also SystemExit: whatever the block raises is told
            _release_reserve()
            return self._failed(error, gradients=gradients)
        return None

    def _passing(self, error: BaseException, saved: set[int]) -> None:
        if fidelity.judge(error) is FailureKind.OOM:
            _release_reserve()
            self._scarcity.note(error, saved)

    def _failed(self, error: BaseException, *, gradients: bool) -> Failure:
        kind = fidelity.judge(error)
        if kind is FailureKind.OOM:
            return self._ran_out(error)
        if scarce.lacks_disk(error, own=self._house.jail.layers.namespaces):
            over = overrun(self._limits, "scratch_bytes", "there is no room for more files")
            full = _over(over)
            return replace(full, message=_told(fidelity.explain(error), full.message))
        said = advice.about(
            fidelity.chain(error), self._house.jail.layers.level, self._house.stores
        )
        return Failure(
            kind=kind,
            message=_told(fidelity.explain(error), said),
            lacked_gradients=not gradients and fidelity.lacked_gradients(error),
        )

    def _ran_out(self, error: BaseException) -> Failure:
        lacking = next((each for each in self._house.devices if each.lacks(error)), None)
        if lacking is None:
            over, there = scarce.of_host(self._limits, error, _peak_bytes()), ""
        else:
            over = scarce.of_gpu(self._limits, error, lacking.memory()[1])
            there = devices.scarcity(lacking)
        meta = self._scarcity.meta(error) | {"error": {**over.details}}
        message = _told(fidelity.explain(error), str(over), there, self._scarcity.text())
        return Failure(kind=FailureKind.OOM, message=message, meta=meta)


def _over(over: OverLimit) -> Failure:
    return Failure(kind=kind_of(over), message=str(over), meta={"error": {**over.details}})


def _told(*parts: str | None) -> str:
    return "\n\n".join(part for part in parts if part)


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read()


def _reseed(seed: int) -> None:
    """Set all random generators by `seed`."""
    random.seed(seed)
    np.random.seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.manual_seed(seed)
    else:  # the rest of `manual_seed` notes down, at some cost, what to do once there is a GPU
        torch.default_generator.manual_seed(seed)


def _release_reserve() -> None:
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    sys.stdout.flush()
