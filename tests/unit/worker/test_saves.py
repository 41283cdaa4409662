"""What is returned, and in how many bytes."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from edif_hpc.domain.limits import Limits
from edif_hpc.errors import OverLimit, TooLarge
from edif_hpc.worker.engine.request import saves
from edif_hpc.worker.engine.request.saves import Store, write
from edif_hpc.worker.engine.values import REPORT_BYTES


def store(path: Path | None = None, **changes: Any) -> Store:
    settings: dict[str, Any] = {"inline_bytes": 1 << 30, "limits": Limits()}
    settings |= {"report": lambda _: None} | changes
    fd = -1 if path is None else os.open(path, os.O_RDWR | os.O_CREAT)
    return Store(fd, **settings)


def returned(values: dict[str, Any], *, compress: bool = False) -> dict[str, Any]:
    kept = store()
    write(values, kept, compress=compress)
    content = kept.inline
    assert content is not None
    assert len(content) == kept.size
    if compress:
        content = zstandard.ZstdDecompressor().decompress(content)
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=False)
    return loaded


def test_a_view_is_cut_down_to_itself() -> None:
    base = torch.arange(10_000.0).reshape(100, 100)
    loaded = returned({"row": base[7], "column": base[:, 3]})
    assert torch.equal(loaded["row"], base[7])
    assert torch.equal(loaded["column"], base[:, 3])
    assert loaded["row"].untyped_storage().nbytes() == 400
    assert loaded["column"].is_contiguous()


def test_what_is_saved_whole_is_not_copied() -> None:
    whole = torch.arange(100.0)
    loaded = returned({"whole": whole, "part": whole[:10]})
    assert loaded["whole"].data_ptr() == loaded["part"].data_ptr()


def test_one_tensor_under_two_names_stays_one() -> None:
    view = torch.arange(1000.0)[:5]
    loaded = returned({"a": view, "b": [view]})
    assert loaded["a"] is loaded["b"][0]


@pytest.mark.parametrize("requires_grad", [True, False])
def test_flags_and_classes_stay(requires_grad: bool) -> None:
    base = torch.zeros(50, requires_grad=requires_grad)
    parameter = torch.nn.Parameter(torch.zeros(50)[:2], requires_grad=requires_grad)
    loaded = returned({"view": (base * 2)[:3], "parameter": parameter})
    assert loaded["view"].requires_grad is requires_grad
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["parameter"].requires_grad is requires_grad


def test_the_frame_says_its_size_and_is_one() -> None:
    kept = store()
    write({"x": torch.zeros(100_000)}, kept, compress=True)
    content = kept.inline
    assert content is not None
    plain = store()
    write({"x": torch.zeros(100_000)}, plain, compress=False)
    assert zstandard.frame_content_size(content) == plain.size
    assert torch.equal(returned({"x": torch.ones(3)}, compress=True)["x"], torch.ones(3))


def test_few_bytes_stay_in_memory_and_many_go_to_the_file(tmp_path: Path) -> None:
    few = store(tmp_path / "few", inline_bytes=10)
    few.write(b"0123456789")
    assert few.inline == b"0123456789"
    assert (tmp_path / "few").read_bytes() == b""
    few.write(b"x")
    assert few.inline is None
    assert (tmp_path / "few").read_bytes() == b"0123456789x"


def test_growth_is_reported_while_writing(tmp_path: Path) -> None:
    seen: list[int] = []
    kept = store(tmp_path / "file", inline_bytes=10, report=seen.append)
    write({"x": torch.zeros(5 * REPORT_BYTES // 4)}, kept, compress=False)
    assert len(seen) >= 4
    assert seen == sorted(seen)
    assert (tmp_path / "file").stat().st_size == kept.size >= seen[-1]


@pytest.mark.parametrize("compress", [True, False])
def test_above_the_limit_it_says_so(compress: bool) -> None:
    few = Limits(result_bytes=1000, sources={"result_bytes": "the relay"})
    with pytest.raises(OverLimit, match=r"size is 1000 bytes, set by the relay\. Save less"):
        write({"x": torch.randn(10_000)}, store(limits=few), compress=compress)


def test_too_many_tensors() -> None:
    kept = store(limits=Limits(saved_tensors=3))
    parts = [torch.ones(1) for _ in range(4)]
    write({"parts": parts[:2], "one": parts[0], "more": {"x": parts[2]}}, kept, compress=False)
    assert kept.tensors == 3
    with pytest.raises(OverLimit, match="saves 4 tensors: its limit of saved tensors is 3"):
        write({"parts": parts}, kept, compress=False)


def test_a_full_disk_is_no_error_of_torch() -> None:
    full = Store(os.open("/dev/full", os.O_WRONLY), inline_bytes=1, limits=Limits(), report=print)
    with pytest.raises(TooLarge, match="No space left"):
        write({"x": torch.randn(10)}, full, compress=False)


def test_what_lies_on_a_device_is_the_same_views_of_one_copy() -> None:
    base = torch.arange(12.0).view(3, 4)
    group = [base, base.t(), base[1], torch.nn.Parameter(base[:, 1:3])]
    copies = saves.on_the_cpu(group)
    for tensor, copied in zip(group, copies, strict=True):
        assert torch.equal(tensor, copied)
        assert tensor.stride() == copied.stride()
        assert (type(tensor), tensor.dtype) == (type(copied), copied.dtype)
        assert tensor.requires_grad == copied.requires_grad
    places = {each.untyped_storage().data_ptr() for each in copies}
    assert len(places) == 1
    assert base.untyped_storage().data_ptr() not in places
    copies[0][1, 1] = 99
    assert copies[2][1] == 99


def test_a_view_that_is_computed_when_read_is_computed() -> None:
    base = torch.tensor([1 + 2j, 3 - 4j])
    whole, conjugate, negative = saves.on_the_cpu([base, base.conj(), base.conj().imag])
    assert torch.equal(whole, base)
    assert torch.equal(conjugate, torch.tensor([1 - 2j, 3 + 4j]))
    assert torch.equal(negative, torch.tensor([-2.0, 4.0]))
