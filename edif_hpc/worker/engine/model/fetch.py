"""Finding a model's files, or bringing them from a hub, in a process of its own.

Fetching needs the network and perhaps a token; what forks executors must have neither, not even as a
remnant in memory. So this program runs before the zygote, tells where the files are and which commit
they are of, and is gone. Where the hub cannot be reached, a copy fetched earlier serves. A folder's
commit is taken from its contents, as the relay's hub takes it (`objects.repository`).

Adapters come from a hub, always: their names are the ones that clients use. Of an adapter two files are
taken, its configuration and its safetensors. Weights as pickles are refused, for reading them runs code.

    python -m edif_hpc.worker.engine.model.fetch CONTROL_FD SOURCE REVISION [ADAPTER[@REVISION] ...]

An empty REVISION is the default branch.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from edif_hpc.domain.adapter import Adapter
from edif_hpc.errors import EngineError
from edif_hpc.objects.repository import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, read_manifest
from edif_hpc.worker.engine.messages import Fetched, Loading, Refused
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, Channel

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.py")
_ADAPTER_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE)

Report = Callable[[int, int], None]


def main(arguments: list[str]) -> int:
    """Say where the files are, and of which commit."""
    control_fd, source, revision, *adapters = arguments
    channel = Channel(
        socket.socket(fileno=int(control_fd)), accepts=(), send_limit=FROM_ZYGOTE_BYTES
    )
    report = _reporter(channel)
    report(0, 0)
    try:
        folder, commit = _model(source, revision or None, report)
        attachable = {
            each.repo_id: str(_adapter(each, report)) for each in map(Adapter.parse, adapters)
        }
        channel.send(Fetched(folder=str(folder), commit=commit, adapters=attachable))
    except Exception as error:  # noqa: BLE001 - a process main: whatever stops it is reported
        channel.send(Refused(code=EngineError.code, message=str(error)[:4000]))
        return 1
    return 0


def _model(source: str, revision: str | None, report: Report) -> tuple[Path, str]:
    """Have the model: from a folder, if `source` is one."""
    with _naming(f"{source!r} at revision {revision!r}"):
        if Path(source).is_dir():
            folder = Path(source).resolve()
            return folder, read_manifest(folder).commit
        folder = _fetched(source, revision, [*_SMALL_FILES, "*.safetensors"], report)
        if not any(folder.glob("*.safetensors")):
            _fetched(source, folder.name, ["*.bin"], report)
        return folder, folder.name


def _adapter(adapter: Adapter, report: Report) -> Path:
    """Have the two files of an adapter."""
    with _naming(f"the adapter {str(adapter)!r}"):
        folder = _fetched(adapter.repo_id, adapter.revision, _ADAPTER_FILES, report)
        missing = [each for each in _ADAPTER_FILES if not (folder / each).is_file()]
        if missing:
            raise EngineError(_refusal(missing, _names(adapter.repo_id, folder.name)))
        return folder


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise EngineError(f"cannot have {what}: {error}") from error


def _refusal(missing: Sequence[str], names: Sequence[str]) -> str:
    pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles and missing == [ADAPTER_WEIGHTS_FILE]:
        return (
            f"its weights are a pickle ({', '.join(pickles)}), which runs code when it is read; only "
            f"{ADAPTER_WEIGHTS_FILE} is served. Save it again with a present peft, which writes that"
        )
    return f"it has no {' and no '.join(missing)}, so it is no adapter of peft"


def _fetched(repository: str, revision: str | None, wanted: Sequence[str], report: Report) -> Path:
    """Have the wanted files of one commit; its folder in the cache is named by it.

    Where the hub is away, the commit that the revision last meant serves, if all wanted files are here.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - heavy, and not needed for a folder

    have = partial(snapshot_download, repository, revision=revision, allow_patterns=list(wanted))
    try:
        return Path(have(tqdm_class=_counting(report)))
    except Exception as error:
        # Of whichever client of HTTP the hub's library has. It takes this for a mistake in the proxy's settings; here
        # it means that the way to the hub is closed.
        if type(error).__name__ != "ProxyError":
            raise
        return Path(have(local_files_only=True))


def _names(repository: str, commit: str) -> Sequence[str]:
    from huggingface_hub import HfApi  # noqa: PLC0415 - as above

    return HfApi().list_repo_files(repository, revision=commit)


def _reporter(channel: Channel) -> Report:
    last = -1

    def report(done: int, total: int) -> None:
        nonlocal last
        percent = done * 100 // total if total else 0
        if percent != last:
            last = percent
            channel.send(Loading(stage="fetching", done=done, total=total))

    return report


def _counting(report: Report) -> Any:
    """Return a progress bar for the hub's downloads that reports bytes and draws nothing."""
    from tqdm.auto import tqdm  # noqa: PLC0415

    class Counting(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": False, "file": None, "gui": True})

        def display(self, *_: Any, **__: Any) -> None:
            if self.unit == "B":
                report(int(self.n), int(self.total or 0))

    return Counting


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
