"""The researcher's own classes and functions, on the way in and on the way out.

*In.* nnsight sends a function by its source and compiles that at the top level of a module. A method loses there what it had
from standing in a class: `super()` finds none, and a private name (`self.__n`) is no longer written with the class's. So when
a class that came along is put together, each such method is compiled again, within a class of that name.

*Out.* What comes back as an instance of such a class is to be one of the client's own class, or `isinstance` fails and fields
are gone. pickle writes classes by their names, and refuses one that cannot be found under its name here, although it can there.
So a class that came along is written as the question for it: the client's cloudpickle knows what it sent from this process by a
mark. A process that sent nothing, such as one that only fetches, looks for the name, and finding none makes a bare class of it.

What the block itself defined is sent by value, as nnsight does on the way in.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from types import CellType, CodeType, FunctionType, MappingProxyType
from typing import Any

import torch
from cloudpickle import cloudpickle
from nnsight.intervention import serialization
from nnsight.intervention.serialization import CustomCloudPickler, CustomCloudUnpickler

from edif_hpc.errors import InvalidInput

#: What a function can only say within a class.
_OF_A_CLASS = re.compile(r"\bsuper\b|\b__class__\b|\b__(?!\w*__\b)\w")

#: Decorators that nnsight sends as what they make, or that make nothing.
_KEPT = frozenset(
    """property setter getter deleter staticmethod classmethod cached_property abstractmethod
    overload override final traceable""".split()  # noqa: SIM905 - a list of them would fill the page
)
#: Those that are put back.
_KNOWN: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        "contextmanager": contextmanager,
        "no_grad": torch.no_grad(),
        "enable_grad": torch.enable_grad(),
        "inference_mode": torch.inference_mode(),
    }
)
_BARE = (
    "[edif] nnsight sends {name} without its decorator @{decorator}, and so it runs here; to have it decorated, "
    "leave that away and decorate it in the block\n"
)


class Unpickler(CustomCloudUnpickler):  # type: ignore[misc]
    """Reads what a client sent; methods keep what they have of their class."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what a name of the payload stands for.

        Raises:
            InvalidInput: nothing here has it.
        """
        if (own := _OWN.get((module, name))) is not None:
            return own
        try:
            return super().find_class(module, name)
        except (ImportError, AttributeError) as error:
            raise InvalidInput(
                f"the request uses {module}.{name}, which the worker does not have. It has the packages that "
                "nnsight.compare() lists; of your own modules nnsight sends functions and classes, but not what a "
                "decorator like functools.lru_cache makes of one: use that without"
            ) from error


class Pickler(CustomCloudPickler):  # type: ignore[misc]
    """Writes what goes to a client; its own classes, which are `sent`, as the question for them."""

    sent: Mapping[type, str] = MappingProxyType({})

    def reducer_override(self, obj: Any) -> Any:
        """Return how to write an object, if not as usual."""
        if not isinstance(obj, type):
            slots = self._slots(type(obj)) if self.sent else ()
            return _with_slots(obj, slots) if slots else super().reducer_override(obj)
        mark = self.sent.get(obj)
        if mark is None:
            return super().reducer_override(obj)
        return cloudpickle._lookup_class_or_track, (mark, _Named(obj))  # noqa: SLF001 - as in its own pickles

    def _slots(self, cls: type) -> set[str]:
        """Return the slots of a class that was sent; nnsight builds it without them."""
        named = [vars(each).get("__slots__", ()) for each in cls.__mro__ if each in self.sent]
        return {slot for names in named for slot in ([names] if isinstance(names, str) else names)}


class _Named:
    """Written as a look for a class by its name, which ends at a bare one."""

    def __init__(self, cls: type) -> None:
        self.cls = cls

    def __reduce__(self) -> tuple[Any, ...]:
        bare = _Call(type, self.cls.__name__, (), {"__module__": self.cls.__module__})
        module = _Call(importlib.import_module, self.cls.__module__)
        return getattr, (module, self.cls.__qualname__, bare)


class _Call:
    """Written as a call, made where it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def sent() -> dict[type, str]:
    """Return the classes that came along, each with the mark by which its client knows it."""
    return dict(cloudpickle._DYNAMIC_CLASS_TRACKER_BY_CLASS)  # noqa: SLF001 - it has no other way


def _with_slots(obj: Any, slots: Collection[str]) -> Any:
    """Return how to write an object for a class that has slots where it is read."""
    reduced = obj.__reduce_ex__(4)
    ways = ("__getstate__", "__reduce__", "__reduce_ex__")
    if any(getattr(type(obj), way) is not getattr(object, way) for way in ways):
        return reduced  # it has its own
    state = vars(obj)
    free = {name: value for name, value in state.items() if name not in slots}
    filled = {name: value for name, value in state.items() if name in slots}
    return *reduced[:2], (free or None, filled), *reduced[3:]


def _load_function(source: str, name: str, *facts: Any) -> Any:
    """Do what nnsight does, which leaves out decorators; put back those that are known, and tell of others."""
    function = serialization._load_function(source, name, *facts)  # noqa: SLF001 - what the payload names
    if not source.lstrip().startswith("@"):
        return function
    for decorator in reversed(getattr(ast.parse(source).body[0], "decorator_list", [])):
        words = ast.unparse(decorator)
        word = words.partition("(")[0].rpartition(".")[2]
        if word in _KNOWN:
            function = _KNOWN[word](function)
        elif word not in _KEPT:
            sys.stderr.write(_BARE.format(name=name, decorator=words))
    return function


def _fill(function: Any, names: Mapping[str, Any]) -> None:
    """Give the function that was sent what it knows, also if it was decorated meanwhile."""
    serialization._fill(inspect.unwrap(function), names)  # noqa: SLF001 - what the payload names


def _put_together(cls: type, state: Any) -> type:
    """Do what cloudpickle does, then give methods back what they have of their class."""
    cloudpickle._class_setstate(cls, state)  # noqa: SLF001 - see above
    for name, attribute in [*vars(cls).items()]:
        mended = _mended(attribute, cls)
        if mended is not attribute:
            setattr(cls, name, mended)
    return cls


def _mended(attribute: Any, cls: type) -> Any:
    if isinstance(attribute, FunctionType):
        return _within(attribute, cls)
    if isinstance(attribute, staticmethod | classmethod):
        return type(attribute)(_mended(attribute.__func__, cls))
    if type(attribute) is property:
        get, put, remove = attribute.fget, attribute.fset, attribute.fdel
        return property(
            _mended(get, cls), _mended(put, cls), _mended(remove, cls), attribute.__doc__
        )
    if isinstance(attribute, cached_property):
        attribute.func = _mended(attribute.func, cls)
    return attribute


def _within(function: FunctionType, cls: type) -> FunctionType:
    """Return the function as if it stood in `cls`; itself if that makes no difference."""
    if not function.__code__.co_filename.startswith("["):  # nnsight did not compile it
        return function
    source = "".join(linecache.getlines(function.__code__.co_filename))
    if not _OF_A_CLASS.search(source) or not cls.__name__.isidentifier():
        return function
    [outer] = ast.parse(f"class {cls.__name__}: pass").body
    outer.body = ast.parse(source).body  # type: ignore[attr-defined]
    whole = compile(ast.Module([outer], []), function.__code__.co_filename, "exec")
    found = [*_codes(whole, function.__name__)]
    if not found or set(found[0].co_freevars) - {"__class__"}:
        return function
    cells = tuple(CellType(cls) for _ in found[0].co_freevars)
    moved = FunctionType(
        found[0], function.__globals__, function.__name__, function.__defaults__, cells
    )
    moved.__kwdefaults__, moved.__annotations__ = function.__kwdefaults__, function.__annotations__
    moved.__qualname__, moved.__module__ = function.__qualname__, function.__module__
    moved.__doc__ = function.__doc__
    moved.__dict__.update(function.__dict__)
    return moved


def _codes(code: CodeType, name: str) -> Iterator[CodeType]:
    """Yield the codes of that name within `code`, outer ones first."""
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    yield from (each for each in inner if each.co_name == name)
    for each in inner:
        yield from _codes(each, name)


_OWN: Mapping[tuple[str, str], Callable[..., Any]] = MappingProxyType(
    {
        ("cloudpickle.cloudpickle", "_class_setstate"): _put_together,
        ("nnsight.intervention.serialization", "_load_function"): _load_function,
        ("nnsight.intervention.serialization", "_fill"): _fill,
    }
)
