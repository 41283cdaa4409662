from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from edif_hpc.errors import InvalidInput
from edif_hpc.objects.repository import (
    File,
    Kind,
    Manifest,
    check_repo_id,
    find_files,
    kind_of,
    read_manifest,
)

TENSOR_BYTES = 1 << 20
HEADER = b'{"a": {"dtype": "U8", "shape": [9], "data_offsets": [0, 9]}}'
CUT = len(HEADER).to_bytes(8, "little") + HEADER + bytes(8)


def write_safetensors(path: Path, tensors: dict[str, bytes]) -> None:
    header, offset = {}, 0
    for name, data in tensors.items():
        end = offset + len(data)
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "additional_chat_templates" / "tool.jinja").write_text("x")
    write_safetensors(
        folder / "model.safetensors", {"a": bytes(TENSOR_BYTES), "b": bytes(TENSOR_BYTES)}
    )
    (folder / "modeling.py").write_text("pass")
    for unseen in ("optimizer.pt", "trainer_state.json", "token.txt", ".env", "pytorch_model.bin"):
        (folder / unseen).write_text("secret")
    return folder


def test_an_adapter_counts_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    write_safetensors(tmp_path / "adapter_model.safetensors", {"a": b"12"})
    (tmp_path / "adapter_model.bin").write_text("a pickle")
    manifest = read_manifest(tmp_path)
    assert set(manifest.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert manifest.parameters == {"U8": 2}
    manifest.check()
    # Weights of the model itself may lie beside an adapter's.
    (tmp_path / "pytorch_model.bin").write_text("weights")
    assert "pytorch_model.bin" in find_files(tmp_path)


def test_only_what_makes_the_model_counts(folder: Path) -> None:
    manifest = read_manifest(folder)
    assert set(manifest.files) == {
        "config.json",
        "tokenizer.json",
        "additional_chat_templates/tool.jinja",
        "model.safetensors",
        "modeling.py",
    }
    assert manifest.parameters == {"U8": 2 * TENSOR_BYTES}
    manifest.check()


def test_other_weights_count_where_there_are_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "pytorch_model.bin" in find_files(folder)


def test_a_copy_elsewhere_has_the_same_commit(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    os.utime(tmp_path / "copy" / "config.json", (1, 1))
    (tmp_path / "copy" / "trainer_state.json").write_text("more")
    assert read_manifest(tmp_path / "copy").commit == read_manifest(folder).commit
    assert len(read_manifest(folder).commit) == 40


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", b'{"a": 1}'),
        ("modeling.py", b"import os"),
        ("model.safetensors", {"a": bytes(TENSOR_BYTES), "b": b"\1" * TENSOR_BYTES}),
        ("model.safetensors", {"a": bytes(TENSOR_BYTES), "c": bytes(TENSOR_BYTES)}),
    ],
)
def test_what_changes_the_model_changes_its_commit(
    folder: Path, file: str, change: bytes | dict[str, bytes]
) -> None:
    before = read_manifest(folder).commit
    if isinstance(change, bytes):
        (folder / file).write_bytes(change)
    else:
        write_safetensors(folder / file, change)
    assert read_manifest(folder).commit != before


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 8 + b"{}", b"\2\0\0\0\0\0\0\0[]", b"\2\0\0\0\0\0\0\0{", CUT]
)
def test_damaged_weights_are_named(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"model\.safetensors is no safetensors file"):
        read_manifest(folder)


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"holds no config\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("config.json", Kind.CONFIG),
        ("tokenizer_config.json", Kind.CONFIG),
        ("spiece.model", Kind.CONFIG),
        ("additional_chat_templates/a.jinja", Kind.CONFIG),
        ("model-00001-of-00002.safetensors", Kind.WEIGHTS),
        ("model.safetensors.index.json", Kind.WEIGHTS),
        ("modeling_own.py", Kind.CODE),
        ("sub/config.json", None),
        ("sub/own.py", None),
        ("../config.json", None),
        ("additional_chat_templates/../a.jinja", None),
        ("/config.json", None),
        ("config.json\n", None),
        (".tokenizer.json", None),
        ("", None),
        ("optimizer.pt", None),
    ],
)
def test_kinds(name: str, kind: Kind | None) -> None:
    assert kind_of(name) is kind


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"../x.py": ("0" * 64, 1)}, "not part of a model"),
        ({"config.json": ("0" * 63, 1)}, "digest"),
        ({"config.json": ("0" * 64, -1)}, "size -1"),
        ({"tokenizer.json": ("0" * 64, 1)}, r"no config\.json"),
    ],
)
def test_a_manifest_from_outside_is_checked(files: dict[str, tuple[str, int]], text: str) -> None:
    made = {name: File(digest=digest, size_bytes=size) for name, (digest, size) in files.items()}
    with pytest.raises(InvalidInput, match=text):
        Manifest(files=made).check()


@pytest.mark.parametrize(
    "name", ["gpt2", "a/b/c", "../a", "a/..", ".a/b", "a/b\n", "a/" + "b" * 97]
)
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(InvalidInput, match="ORG/NAME"):
        check_repo_id(name)
