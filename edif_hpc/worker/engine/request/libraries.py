"""What libraries do by habit and walls forbid, and how they are told another way that works.

Nothing is taken away from them, and none is imported here: a request imports what it likes, when it likes.

torch hands a tensor to another process as a descriptor, by a socket that it opens for that, and a request has no sockets. It
would not fail, either: the error is raised in a thread of the child, and the parent waits. So tensors are sent by value.

multiprocessing has a process that it starts anew import the main program first. Here that is the zygote, which is none of its
business. So the main program has no name and no file, as in a notebook.

datasets keeps what `map` and `filter` make of a data set beside it, for the next run. A store is read-only, and no next run
would find it. With its cache switched off, it keeps that in the folder for temporary files.
"""

from __future__ import annotations

import importlib.util
import io
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch.multiprocessing import reductions


def prepare() -> None:
    """Tell this process, and all that is forked from it."""
    table: Any = reductions.reduction  # type: ignore[attr-defined]  # where torch registers its own way
    for kind in (torch.Tensor, torch.nn.Parameter):
        table.register(kind, _by_value)
    _once_imported("datasets", lambda module: module.disable_caching())
    main = sys.modules["__main__"]
    main.__spec__ = None
    vars(main).pop("__file__", None)


def _once_imported(name: str, then: Callable[[Any], None]) -> None:
    """Call `then` with a module: now, or when somebody imports it."""
    if name in sys.modules:
        then(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, then))


def _by_value(tensor: torch.Tensor) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return _from_bytes, (buffer.getvalue(),)


def _from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


class _AfterImport(MetaPathFinder):
    """Calls `then` with a module when somebody has imported it, once."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self._name, self._then = name, then

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - of a package's modules, and this looks for no such
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Find what the others find."""
        if fullname != self._name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self._then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
