"""The Python code blocks of nnsight's own documentation.

What nnsight documents is what its users write, so its documentation is the yardstick of our fidelity. It comes with
nnsight's source distribution, which pip downloads from whatever index it is configured for; the archive is kept in the
user's cache and taken only with the known checksum. Nothing of its text is kept in our repository: a block is named by its
page and number, and a short checksum tells whether its text is still the one that was judged.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edif_hpc.testing.debian import PartMissing, download

VERSION: Final = "0.8.1"
ARCHIVE: Final = f"nnsight-{VERSION}.tar.gz"
SHA256: Final = "0fd9bd354b202d39f1d1ae90cdd02c1112e628325878b49a600876994b210867"
SECTIONS: Final = ("usage", "remote", "patterns")
DOWNLOAD_S: Final = 300.0

_FENCE = re.compile(
    r"^(?P<indent> *)```python[^\n]*\n(?P<text>.*?)^ *```[ ]*$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: `page` is section/name, `number` counts from 1 on its page."""

    page: str
    number: int
    text: str

    @property
    def id(self) -> str:
        """Its name in the table."""
        return f"{self.page}#{self.number}"

    @property
    def digest(self) -> str:
        """The start of the checksum of its text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


def blocks() -> list[Block]:
    """All blocks, in the order of the pages; raise `PartMissing` if the archive cannot be had."""
    pages = _pages(archive())
    return [block for name in sorted(pages, key=_place) for block in parse(name, pages[name])]


def parse(page: str, text: str) -> Iterator[Block]:
    """The blocks of one page."""
    for number, match in enumerate(_FENCE.finditer(text), start=1):
        yield Block(page=page, number=number, text=textwrap.dedent(match["text"]))


def archive() -> Path:
    """The source distribution, downloaded unless it is cached."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(home) / "edif-hpc"
    file = folder / ARCHIVE
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        wanted = ["--no-binary", "nnsight", f"nnsight=={VERSION}"]
        download(*wanted, folder=folder, timeout_s=DOWNLOAD_S)
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise PartMissing(
            f"{file} has sha256 {found}, not {SHA256}; delete it to have it fetched again"
        )
    return file


def _pages(file: Path) -> dict[str, str]:
    pages = {}
    with tarfile.open(file) as tar:
        for member in tar.getmembers():
            section, _, name = member.name.partition("/docs/")[2].partition("/")
            stream = tar.extractfile(member) if section in SECTIONS else None
            if stream is not None and name.endswith(".md"):
                pages[f"{section}/{name.removesuffix('.md')}"] = stream.read().decode()
    return pages


def _place(page: str) -> tuple[int, str]:
    section, _, name = page.partition("/")
    return SECTIONS.index(section), name
