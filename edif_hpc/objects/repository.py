"""A model's folder, or an adapter's, as a repository: which files count, and the commit that names their contents.

Relay, worker and command line see the same model on different machines, and must call it by the same name: a result's
`meta.commit` is worth something only if the hub shows that commit too. So a commit is a hash over the names, sizes and
digests of all files that make up the model, its settings, weights and code, whether or not anybody is given them.

The files are a closed list. A training folder also holds optimizer states, logs and perhaps a token; what is not listed
is not seen, so it can be neither published nor change a commit.

Settings and code are hashed whole. Of safetensors the header is hashed, and two pages of each tensor: some megabytes of a
model of any size, enough to tell apart what training, editing or quantizing made, since these change whole tensors. It is
a fingerprint against mistakes and not against forgery: who can write the folder is trusted with the model anyway.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO

import msgspec
from msgspec import Struct

from edif_hpc.errors import InvalidInput

CONFIG_FILE = "config.json"
ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_NOTHING = f"no model of transformers (nor an adapter, which has {ADAPTER_CONFIG_FILE})"
_TEMPLATES = "additional_chat_templates"
_PAGE_BYTES = 4096
_MAX_HEADER_BYTES = 100 << 20
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Kind(StrEnum):
    """Why a file counts."""

    CONFIG = "config"  #: what a client needs to build the model without weights, and to tokenize
    WEIGHTS = "weights"
    CODE = "code"  #: what runs under trust_remote_code


_PATTERNS: Mapping[Kind, tuple[str, ...]] = {
    Kind.CONFIG: (
        CONFIG_FILE, ADAPTER_CONFIG_FILE, "generation_config.json", "*tokenizer*.json", "special_tokens_map.json",
        "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "normalizer.json", "tekken.json",
        "*.model", "*.spm", "*.tiktoken", "*processor_config.json", "chat_template.json",
        "chat_template.jinja", f"{_TEMPLATES}/*.jinja",
    ),
    Kind.WEIGHTS: (
        "model*.safetensors", "model*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
        ADAPTER_WEIGHTS_FILE,
    ),
    Kind.CODE: ("*.py",),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class File:
    """One file's size and digest."""

    size_bytes: int
    digest: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All files that count, and the number of parameters by the checkpoint's names of dtypes."""

    files: dict[str, File]
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """40 hex digits, as the Hub's clients expect."""
        lines = [
            f"{name}\n{file.size_bytes}\n{file.digest}\n"
            for name, file in sorted(self.files.items())
        ]
        return hashlib.sha256("".join(lines).encode()).hexdigest()[:40]

    def check(self) -> None:
        """Raise `InvalidInput` unless every name is one of ours and every digest looks like one."""
        for name, file in self.files.items():
            if kind_of(name) is None:
                raise InvalidInput(
                    f"the file {name[:200]!r} is not part of a model; see docs/howto/hub.md for what is"
                )
            if file.size_bytes < 0 or not _DIGEST.fullmatch(file.digest):
                raise InvalidInput(
                    f"the file {name} has size {file.size_bytes} and digest {file.digest[:80]!r}"
                )
        if not _names_a_model(self.files):
            raise InvalidInput(f"there is no {CONFIG_FILE} among the files, so it is {_NOTHING}")


def kind_of(name: str) -> Kind | None:
    """Why a file of this name counts; None if it does not. A name that could leave the folder never does."""
    parts = name.split("/")
    if not all(_FILE_NAME.fullmatch(part) for part in parts):
        return None
    for kind, patterns in _PATTERNS.items():
        if any(len(parts) == each.count("/") + 1 and fnmatchcase(name, each) for each in patterns):
            return kind
    return None


def is_repo_id(text: str) -> bool:
    """Whether a name is ORG/NAME as the Hub writes it."""
    return _REPO_ID.fullmatch(text) is not None


def check_repo_id(text: str) -> str:
    """Return the name of a repository, or raise `InvalidInput`: it becomes part of paths and URLs."""
    if not is_repo_id(text):
        raise InvalidInput(
            f"the name {text[:200]!r} must be ORG/NAME, of letters, digits, '.', '_' and '-'"
        )
    return text


def find_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that count, by name. Where there are safetensors, other weights do not."""
    found = {name: folder / name for name in _candidates(folder) if kind_of(name) is not None}
    if any(_is_safetensors(name) and name != ADAPTER_WEIGHTS_FILE for name in found):
        found = {
            name: path for name, path in found.items() if not name.startswith("pytorch_model")
        }
    return found


def read_manifest(folder: Path) -> Manifest:
    """Take stock of a folder; `InvalidInput` if it holds no model."""
    files: dict[str, File] = {}
    parameters: Counter[str] = Counter()
    try:
        for name, path in find_files(folder).items():
            files[name] = File(
                size_bytes=path.stat().st_size,
                digest=digest_of(path, safetensors=_is_safetensors(name)),
            )
            if _is_safetensors(name):
                parameters.update(_parameters(path))
    except OSError as error:
        raise InvalidInput(f"cannot read the model in {folder}: {error}") from error
    manifest = Manifest(files=files, parameters=dict(parameters))
    if not _names_a_model(files):
        raise InvalidInput(f"{folder} holds no {CONFIG_FILE}, so it is {_NOTHING}")
    return manifest


def digest_of(path: Path, *, safetensors: bool) -> str:
    """What stands for a file's contents: see the module's text."""
    with path.open("rb", buffering=0) as stream:
        if not safetensors:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        header, tensors = _header(stream, path)
        digest = hashlib.sha256(header)
        start = stream.tell()
        for first, end in sorted(each.data_offsets for each in tensors):
            for offset in (first, (first + end) // 2):
                stream.seek(start + offset)
                digest.update(stream.read(min(_PAGE_BYTES, end - offset)))
        return digest.hexdigest()


def _names_a_model(files: Mapping[str, File]) -> bool:
    """Whether there is the file by which a model, or an adapter, is known."""
    return CONFIG_FILE in files or ADAPTER_CONFIG_FILE in files


class _Tensor(Struct, frozen=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def _is_safetensors(name: str) -> bool:
    return name.endswith(".safetensors")


def _candidates(folder: Path) -> Iterator[str]:
    for below in (folder, folder / _TEMPLATES):
        if below.is_dir():
            yield from sorted(
                path.relative_to(folder).as_posix() for path in below.iterdir() if path.is_file()
            )


def _parameters(path: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    with path.open("rb", buffering=0) as stream:
        for tensor in _header(stream, path)[1]:
            counts[tensor.dtype] += math.prod(tensor.shape)
    return counts


def _header(stream: BinaryIO, path: Path) -> tuple[bytes, list[_Tensor]]:
    """The header of a safetensors file; the stream stands at the data then."""
    length = int.from_bytes(stream.read(8), "little")
    header = stream.read(min(length, _MAX_HEADER_BYTES))
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = [msgspec.json.decode(each, type=_Tensor) for each in entries.values()]
    except msgspec.DecodeError as error:
        raise InvalidInput(f"{path} is no safetensors file ({error}); copy it again") from error
    told = 8 + length + max((each.data_offsets[1] for each in tensors), default=0)
    found = path.stat().st_size
    if found < told:
        raise InvalidInput(
            f"{path} is no safetensors file of {told} bytes: it has {found}; copy it again"
        )
    return header, tensors
