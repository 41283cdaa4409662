"""The last words of allocations that could not speak to the relay, on their way through the site's shared folder.

A pilot leaves them in `state_dir/unheard`, the launcher brings them to the relay in its next round and removes them. The
folder is empty as a rule, so looking into it costs nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from edif_hpc.slurm.order import write_order

_log = logging.getLogger(__name__)

_FOLDER = "unheard"
_AT_A_TIME = 100


class LastWords(msgspec.Struct, frozen=True, kw_only=True):
    """Why an allocation ended, which the relay could not be told."""

    name: str  #: of the allocation
    node: str
    detail: str


def leave_words(state_dir: Path, words: LastWords) -> None:
    """Leave them for a launcher."""
    folder = state_dir / _FOLDER
    folder.mkdir(exist_ok=True, mode=0o700)
    new = folder / f"{words.name}.new"
    write_order(new, words)
    new.rename(new.with_suffix(".json"))


def find_words(state_dir: Path) -> list[LastWords]:
    """Those that wait."""
    files = sorted((state_dir / _FOLDER).glob("*.json"))[:_AT_A_TIME]
    found = []
    for file in files:
        try:
            found.append(msgspec.json.decode(file.read_bytes(), type=LastWords))
        except (OSError, msgspec.DecodeError) as error:
            _log.warning("%s cannot be read: %s", file, error, extra={"event": "words_unread"})
    return found


def forget_words(state_dir: Path, heard: Iterable[LastWords]) -> None:
    """The relay has heard them; what cannot be removed it hears again."""
    for each in heard:
        file = state_dir / _FOLDER / f"{each.name}.json"
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            _log.warning("%s cannot be removed: %s", file, error, extra={"event": "words_stay"})
