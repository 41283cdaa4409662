"""From what a request saved to the bytes that its client loads.

*How much.* A tensor drags its whole storage along when it is written, so one saved row would carry a
whole activation. Views are therefore copied down to what was saved. Tensors that share a storage keep
sharing it, unless that would carry more bytes than they have. What lies on a device is copied to the CPU first,
storage by storage, since the client may have no such device.

*Two passes.* The client reads one zstd frame and needs the size in its header, so the result is written
twice: counted into nothing, then streamed through the compressor. Neither holds it in memory.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, SimpleNamespace
from typing import Any, Protocol

import torch
import zstandard

from edif_hpc.domain.limits import Limits, overrun
from edif_hpc.errors import InvalidInput, TooLarge
from edif_hpc.worker.engine.request import classes
from edif_hpc.worker.engine.values import REPORT_BYTES

COMPRESSION_LEVEL = 1
NO_CLASSES: Mapping[type, str] = MappingProxyType({})
PIECE_BYTES = 1024 * 1024


class Sink(Protocol):
    """Where `torch.save` writes."""

    def write(self, data: Any) -> int:
        """Take bytes; return how many."""
        ...

    def flush(self) -> None:
        """Do nothing, or hand on what is held."""
        ...


class Counter:
    """A sink that only counts."""

    def __init__(self) -> None:
        self.size = 0

    def write(self, data: Any) -> int:
        """Take bytes; return how many."""
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Do nothing."""


class Store:
    """Takes the final bytes: into memory while they are few, into the file from then on."""

    def __init__(
        self, fd: int, *, inline_bytes: int, limits: Limits, report: Callable[[int], None]
    ) -> None:
        self._fd = fd
        self._inline_bytes, self.limits = inline_bytes, limits
        self._report = report
        self._held: io.BytesIO | None = io.BytesIO()
        self._reported = 0
        self.size = 0
        #: How many tensors were saved.
        self.tensors = 0
        #: What stopped the writing. `torch.save` turns it into an error of its own.
        self.failure: Exception | None = None

    @property
    def inline(self) -> bytes | None:
        """All bytes, if they were few."""
        return None if self._held is None else self._held.getvalue()

    def write(self, data: Any) -> int:
        """Take bytes; return how many.

        Raises:
            OverLimit: the result is above the limit.
            TooLarge: the disk is full.
        """
        view = memoryview(data).cast("B")
        try:
            for start in range(0, view.nbytes, PIECE_BYTES):
                self._take(view[start : start + PIECE_BYTES])
        except Exception as error:
            self.failure = self.failure or error
            raise
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: what is held is wanted as it is."""

    def _take(self, view: memoryview) -> None:
        self.size += view.nbytes
        if self.size > self.limits.result_bytes:
            raise overrun(self.limits, "result_bytes", "the result is too large to be returned")
        if self._held is not None and self.size <= self._inline_bytes:
            self._held.write(view)
            return
        if self._held is not None:
            self._to_file(self._held.getbuffer())
            self._held = None
        self._to_file(view)
        if self.size - self._reported >= REPORT_BYTES:
            self._reported = self.size
            self._report(self.size)

    def _to_file(self, view: memoryview) -> None:
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise TooLarge(
                f"the result could not be kept: {error}; save less, or try later"
            ) from error


class Compressed:
    """A sink that compresses on the way into a store, in pieces, as one frame of known size."""

    def __init__(self, store: Store, size: int) -> None:
        self._store = store
        self._frame = zstandard.ZstdCompressor(level=COMPRESSION_LEVEL).compressobj(size=size)

    def write(self, data: Any) -> int:
        """Take bytes; return how many."""
        view = memoryview(data).cast("B")
        for start in range(0, view.nbytes, PIECE_BYTES):
            self._store.write(self._frame.compress(view[start : start + PIECE_BYTES]))
        return view.nbytes

    def flush(self) -> None:
        """Do nothing: the frame ends with `finish`."""

    def finish(self) -> None:
        """End the frame; zstd refuses if the size was not the announced one."""
        self._store.write(self._frame.flush())


def write(
    saves: dict[str, Any], store: Store, *, compress: bool, sent: Mapping[type, str] = NO_CLASSES
) -> None:
    """Write the result into `store` as the client expects it; classes that it `sent` it has.

    Raises:
        OverLimit: it has too many bytes or tensors.
        TooLarge: it cannot be kept.
    """
    try:
        _write(saves, store, sent, compress=compress)
    except RuntimeError as error:
        raise store.failure or error from None


def _count(tensors: list[torch.Tensor], store: Store) -> list[torch.Tensor]:
    store.tensors = len(tensors)
    if len(tensors) > store.limits.saved_tensors:
        happened = f"the request saves {len(tensors):,} tensors"
        raise overrun(store.limits, "saved_tensors", happened, saved_tensors=len(tensors))
    return tensors


def _write(
    saves: dict[str, Any], store: Store, sent: Mapping[type, str], *, compress: bool
) -> None:
    module = _pickling(_compact(_count(_tensors(saves, sent), store)), sent)
    if not compress:
        _save(saves, store, module)
        return
    counter = Counter()
    with _no_checksums():
        _save(saves, counter, module)
    frame = Compressed(store, counter.size)
    _save(saves, frame, module)
    frame.finish()


@contextmanager
def _no_checksums() -> Iterator[None]:
    """Let `torch.save` leave out its CRCs, which change no length: for bytes that nobody keeps."""
    usual = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(compute_crc32=False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(usual)


def _save(saves: dict[str, Any], sink: Sink, module: Any) -> None:
    torch.save(saves, sink, pickle_module=module, pickle_protocol=4)  # type: ignore[arg-type]


def _pickling(replaced: Mapping[int, torch.Tensor], own: Mapping[type, str]) -> Any:
    """Return what `torch.save` wants for a pickle module: one that writes replacements."""

    class Pickler(classes.Pickler):
        sent = own

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, torch.Tensor):
                return super().reducer_override(obj)
            other = replaced.get(id(obj))
            return NotImplemented if other is None else other.__reduce_ex__(4)  # type: ignore[no-untyped-call]

    return SimpleNamespace(Pickler=Pickler, __name__="pickle")


def _compact(tensors: list[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Return, by id of the tensor, a stand-in for each that drags more than it shows, or lies on a device."""
    by_storage: dict[int, list[torch.Tensor]] = {}
    replaced: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        if _copyable(tensor):
            by_storage.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)  # noqa: SLF001
        elif _on_device(tensor):
            replaced[id(tensor)] = tensor.detach().cpu().requires_grad_(tensor.requires_grad)
    for group in by_storage.values():
        kept = group[0].untyped_storage().nbytes()
        if sum(t.numel() * t.element_size() for t in group) < kept:
            replaced |= {id(t): _copy(t) for t in group}
        elif _on_device(group[0]):
            replaced |= zip(map(id, group), on_the_cpu(group), strict=True)
    return replaced


def on_the_cpu(group: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy the storage that these tensors share, once; return the same views of the copy."""
    storage = torch.empty(0, dtype=torch.uint8, device=group[0].device)
    storage.set_(group[0].untyped_storage())
    copied = storage.to("cpu", copy=True).untyped_storage()
    views = []
    for tensor in group:
        if tensor.is_conj() or tensor.is_neg():  # a view that is computed when it is read
            views.append(_copy(tensor.resolve_conj().resolve_neg()))
            continue
        view = torch.empty(0, dtype=tensor.dtype)
        view.set_(copied, tensor.storage_offset(), tensor.shape, tensor.stride())
        views.append(_alike(view, tensor))
    return views


def _on_device(tensor: torch.Tensor) -> bool:
    return tensor.device.type not in {"cpu", "meta"}


def _copyable(tensor: torch.Tensor) -> bool:
    return type(tensor) in {torch.Tensor, torch.nn.Parameter} and tensor.layout is torch.strided


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    copied = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return _alike(copied, tensor)


def _alike(copied: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
    return copied.requires_grad_(tensor.requires_grad)


def _tensors(saves: dict[str, Any], own: Mapping[type, str]) -> list[torch.Tensor]:
    """Return every tensor that writing `saves` would come across, however deep, each once.

    Raises:
        InvalidInput: something among them cannot be written.
    """
    found: dict[int, torch.Tensor] = {}

    class Finder(classes.Pickler):
        sent = own

        def persistent_id(self, obj: Any) -> str | None:
            return (
                "storage" if isinstance(obj, torch.UntypedStorage | torch.TypedStorage) else None
            )

        def reducer_override(self, obj: Any) -> Any:
            if not isinstance(obj, torch.Tensor):
                return super().reducer_override(obj)
            found[id(obj)] = obj
            return NotImplemented

    finder = Finder(_Nowhere(), protocol=4)
    for name, value in saves.items():
        try:
            finder.dump(value)
        except (TypeError, AttributeError, pickle.PicklingError) as error:
            raise InvalidInput(
                f"what was saved as {name!r} cannot be sent to you: {error}. Save what you want to know of it: "
                "tensors, numbers, text, and containers and classes of these"
            ) from error
    return list(found.values())


class _Nowhere(io.RawIOBase):
    def write(self, data: Any) -> int:
        return len(data)
