"""What researchers write around their blocks: classes, helpers, lists to fill; and what they then find at home."""

# ruff: noqa: F841 - what a block binds or prints comes back

from __future__ import annotations

import asyncio
import contextlib
import enum
import functools
import sys
import warnings
from collections import Counter, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import nnsight
import pytest
import torch
from transformers.utils import logging as transformers_logging

from edif_hpc.worker.engine.values import FailureKind
from tests.integration.worker.conftest import Service
from tests.integration.worker.test_fidelity import equal
from tests.integration.worker.test_traps import through


@pytest.fixture(autouse=True, scope="module")
def own_module() -> None:
    """This module is a researcher's: the worker does not have it."""
    nnsight.register(sys.modules[__name__])


# -- classes of one's own ----------------------------------------------------------------------------------------------


class Site(enum.Enum):
    MLP = "mlp"


@dataclass(kw_only=True)
class Found:
    hidden: Any
    site: Site = Site.MLP
    tags: list[str] = field(default_factory=list)

    def norm(self) -> float:
        return float(self.hidden.detach().norm())


class Named(NamedTuple):
    value: Any
    layer: int = 0


Renamed = namedtuple("Other", "a b")  # noqa: PYI024 - as people write it


class Slotted:
    __slots__ = ("x", "y")

    def __init__(self, x: Any) -> None:
        self.x = x


class Freer(Slotted):
    def __init__(self, x: Any) -> None:
        super().__init__(x)
        self.free = 5


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Any


def inner_class() -> type:
    class Inner:
        def __init__(self, v: int) -> None:
            self.v = v

    return Inner


Inner = inner_class()


def own_classes(model: Any, **where: Any) -> dict[str, Any]:
    with model.trace("of my own", **where):
        x = model.transformer.h[0].output[0]
        found = nnsight.save(Found(hidden=x, tags=["a"]))
        named = nnsight.save([Named(x), Renamed(1, x), Slotted(x), Freer(x), Frozen(x), Inner(3)])
        site = nnsight.save(Site.MLP)
    return {"found": found, "named": named, "site": site}


async def test_an_instance_of_ones_own_class_is_one_at_home(service: Service) -> None:
    there = (await service.send(own_classes)).values
    here = own_classes(service.model)
    assert type(there["found"]) is Found
    assert there["found"].norm() == here["found"].norm()
    assert there["found"].site is Site.MLP
    assert there["site"] is Site.MLP
    assert [type(each) for each in there["named"]] == [
        Named,
        Renamed,
        Slotted,
        Freer,
        Frozen,
        Inner,
    ]
    value, renamed, slotted, freer, frozen, inner = there["named"]
    for got in (value.value, renamed.b, slotted.x, freer.x, frozen.x):
        assert torch.equal(got, here["found"].hidden)
    assert (freer.free, inner.v) == (5, 3)
    assert not hasattr(slotted, "y")


async def test_what_a_block_defines_comes_by_value(service: Service) -> None:
    def defining(model: Any, **where: Any) -> None:
        with model.session(**where):

            class Local:
                def __init__(self, v: int) -> None:
                    self.v = v

                def twice(self) -> int:
                    return self.v * 2

            one = nnsight.save(Local(4))
            plus = nnsight.save(lambda x: x + 1)

    values = (await service.send(defining)).values
    assert values["one"].twice() == 8
    assert values["plus"](1) == 2


async def test_another_process_finds_a_class_by_its_name_or_makes_a_bare_one(
    service: Service, tmp_path: Path
) -> None:
    """As with a result that is fetched later, from elsewhere."""

    def sending(model: Any, **where: Any) -> None:
        with model.session(**where):
            slotted = nnsight.save(Slotted(1))
            inner = nnsight.save(Inner(3))

    reply = await service.send(sending, compress=False)
    assert reply.saved.inline is not None
    (tmp_path / "result").write_bytes(reply.saved.inline)
    code = f"""
import torch
from tests.integration.worker.test_own_code import Slotted
got = torch.load({str(tmp_path / "result")!r}, weights_only=False)
assert type(got["slotted"]) is Slotted and got["slotted"].x == 1
assert type(got["inner"]).__name__ == "Inner" and got["inner"].v == 3
"""
    elsewhere = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, cwd=Path(__file__).parents[3]
    )
    assert await asyncio.wait_for(elsewhere.wait(), 60) == 0


class Above:
    def __init__(self, v: int) -> None:
        self.__v = v

    @property
    def v(self) -> int:
        return self.__v

    @classmethod
    def make(cls, v: int) -> Any:
        return cls(v)


class Below(Above):
    __secret = 7

    def __init__(self, v: int, *, more: int = 3) -> None:
        super().__init__(v)
        self.more = more

    @property
    def v(self) -> int:
        return super().v + self.more

    @classmethod
    def make(cls, v: int) -> Any:
        return super().make(v * 10)

    @staticmethod
    def secret() -> Any:
        return Below.__secret, __class__.__name__  # type: ignore[name-defined]


class Autoencoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encode = torch.nn.Linear(64, 8)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.encode(x))


class Mine(ValueError):
    def __init__(self, a: int, b: int) -> None:
        super().__init__(f"{a} and {b}")


async def test_methods_keep_what_they_have_of_their_class(service: Service) -> None:
    def using(model: Any, **where: Any) -> dict[str, Any]:
        with model.trace("two layers", **where):
            coded = Autoencoder()(model.transformer.h[0].output).save()
            made = nnsight.save([Below.make(4).v, Below.secret()])
        return {"coded": coded, "made": made}

    there, here = (await service.send(using)).values, using(service.model)
    assert there["made"] == here["made"] == [43, (7, "Below")]
    assert equal(there["coded"], here["coded"].detach())

    def raising(model: Any, **where: Any) -> None:
        with model.session(**where):
            raise Mine(1, 2)

    assert "Mine: 1 and 2" in (await service.send(raising)).failed.message


# -- helpers -----------------------------------------------------------------------------------------------------------


def twice(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    @functools.wraps(function)
    def doubled(x: Any) -> Any:
        return function(function(x))

    return doubled


@twice
def plus_one(x: Any) -> Any:
    return x + 1


@torch.no_grad()
def detached(x: Any) -> Any:
    return x * 2


@contextlib.contextmanager
def scaled(k: int) -> Iterator[int]:
    yield k * 2


@functools.lru_cache
def remembered(n: int) -> int:
    return n * 2


async def test_a_lost_decorator_is_told(service: Service) -> None:
    def decorated(model: Any, **where: Any) -> None:
        with model.session(**where):
            got = nnsight.save(plus_one(0))

    reply = await service.send(decorated)
    assert reply.values["got"] == 1, (
        "nnsight sends decorators now: leave this test and the warning out"
    )
    assert any("plus_one without its decorator @twice" in line for line in reply.printed)


async def test_known_decorators_are_put_back(service: Service) -> None:
    def decorated(model: Any, **where: Any) -> dict[str, Any]:
        with model.trace("a helper", **where):
            h = model.transformer.h[0].output
            d = detached(h)
            flag = nnsight.save(d.requires_grad)
            with scaled(3) as k, (model.lm_head.output.sum() + d.sum() * k).backward():
                slope = h.grad.save()
        return {"flag": flag, "slope": slope}

    reply, here = await service.send(decorated), decorated(service.model)
    assert reply.values["flag"] is here["flag"] is False
    assert equal(reply.values["slope"], here["slope"])
    assert reply.printed == []


async def test_what_is_not_here_is_named(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What functools.lru_cache makes has only a name to be sent by."""
    mine = ModuleType("of_my_own")
    vars(mine)["remembered"] = remembered
    monkeypatch.setattr(remembered, "__module__", mine.__name__)
    monkeypatch.setitem(sys.modules, mine.__name__, mine)

    def cached(model: Any, **where: Any) -> None:
        with model.session(**where):
            got = nnsight.save(remembered(2))

    failed = (await service.send(cached)).failed
    assert failed.kind is FailureKind.USER
    assert (
        "the request uses of_my_own.remembered, which the worker does not have" in failed.message
    )
    assert "zygote" not in failed.message

    def unsendable(model: Any, **where: Any) -> None:
        with model.session(**where):
            fine = nnsight.save(1)
            lazy = nnsight.save(each for each in [1])

    failed = (await service.send(unsendable)).failed
    assert failed.kind is FailureKind.USER
    assert "what was saved as 'lazy' cannot be sent to you" in failed.message


# -- what is filled in a block -----------------------------------------------------------------------------------------


class Experiment:
    def __init__(self) -> None:
        self.acts: dict[str, Any] = {}


RESULTS: list[Any] = []


async def test_containers_that_a_block_changes_come_back(service: Service) -> None:
    def filling(model: Any, backend: Any = None) -> dict[str, Any]:
        losses: list[float] = [0.5]
        counts, lists, last = Counter[str](), defaultdict(list), deque[Any](maxlen=2)
        gone, nested, untouched, layers = [1, 2], {"a": {"b": [1]}}, [3], [model.transformer.h[0]]
        with model.session(backend=backend):
            for word in ("one", "two"):
                with model.trace(word):
                    kept = model.lm_head.output.save()
                losses.append(float(kept.detach().sum()))
                counts[word] += 1
                lists[word].append(len(losses))
                last.append(kept)
            gone.clear()
            nested["a"]["b"].append("z")
            layers.clear()
        names = ["losses", "counts", "lists", "last", "gone", "nested", "untouched"]
        return {name: value for name, value in locals().items() if name in names}

    found, (sent,) = await through(service, filling)
    here = filling(service.model)
    assert {name: found[name] for name in here if name != "last"} == {
        name: here[name] for name in here if name != "last"
    }
    assert [type(found[name]) for name in here] == [type(each) for each in here.values()]
    assert found["last"].maxlen == 2
    assert equal(list(found["last"]), [each.detach() for each in here["last"]])
    assert "untouched" not in sent
    assert "layers" not in sent


async def test_a_tensor_goes_home_only_if_it_is_saved(service: Service) -> None:
    def filling(model: Any, **where: Any) -> None:
        acts: list[Any] = []
        with model.trace("heavy", **where):
            acts.append(model.transformer.h[0].output)
            done = nnsight.save(1)

    assert (await service.send(filling)).values.keys() == {"done"}


async def test_what_finds_no_way_home_is_told(service: Service) -> None:
    def in_an_attribute(model: Any, **where: Any) -> None:
        mine = Experiment()
        with model.trace("lost", **where):
            hidden = model.transformer.h[0].output.save()
            mine.acts["one"] = hidden

    def in_a_global(model: Any, **where: Any) -> None:
        with model.trace("lost", **where):
            RESULTS.append(model.transformer.h[0].output.save())

    def saved_itself(model: Any, **where: Any) -> None:
        with model.trace("kept", **where):
            mine = nnsight.save(Found(hidden=model.transformer.h[0].output.save(), tags=[]))
            nothing = nnsight.save(None)

    assert [line.split(":")[0] for line in (await service.send(in_an_attribute)).printed] == [
        "[edif] mine.acts"
    ]
    assert [line.split(":")[0] for line in (await service.send(in_a_global)).printed] == [
        "[edif] RESULTS"
    ]
    assert (await service.send(saved_itself)).printed == []


# -- writes into weights -----------------------------------------------------------------------------------------------


def refused(model: Any, **where: Any) -> None:
    with model.session(**where):
        model.transformer.h[0].ln_1._module.weight[0] = 7
        done = nnsight.save(1)


def allowed(model: Any, **where: Any) -> None:
    with model.session(**where):
        model.transformer.h[0].ln_1._module.weight.detach().mul_(1)
        done = nnsight.save(1)


def by_data(model: Any, **where: Any) -> None:
    with model.session(**where):
        model.transformer.h[0].ln_1._module.weight.data.mul_(1)
        done = nnsight.save(1)


async def test_a_write_that_torch_refuses_locally_is_refused(service: Service) -> None:
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        refused(service.model)
    reply = await service.send(refused)
    assert "leaf Variable that requires grad" in reply.failed.message
    assert reply.failed.meta["gradients"] == "retried"


@pytest.mark.parametrize(("block", "told"), [(allowed, "retried"), (by_data, False)])
async def test_a_write_that_torch_allows_is_made(
    block: Callable[..., None], told: object, service: Service
) -> None:
    block(service.model)
    reply = await service.send(block)
    assert reply.saved.meta["gradients"] == told
    assert reply.values["done"] == 1


# -- what is shown -----------------------------------------------------------------------------------------------------


async def test_loggers_of_libraries_are_heard(service: Service) -> None:
    """Their handlers hold on to the stream that they find when they are imported."""

    def logging(model: Any, **where: Any) -> None:
        with model.session(**where):
            transformers_logging.get_logger("transformers.modeling_utils").warning("take care")
            warnings.warn("a warning", stacklevel=1)
            done = nnsight.save(1)

    printed = (await service.send(logging)).printed
    assert any("take care" in line for line in printed)
    assert any("UserWarning: a warning" in line for line in printed)


async def test_the_model_is_called_by_its_name(service: Service) -> None:
    def asking(model: Any, **where: Any) -> None:
        with model.session(**where):
            names = nnsight.save(
                [
                    model.config._name_or_path,
                    model._module.name_or_path,
                    model.tokenizer.name_or_path,
                ]
            )

    assert (await service.send(asking)).values["names"] == ["edif/tiny"] * 3
