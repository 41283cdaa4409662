"""Finding a model's files, or bringing them from a hub, in a process of its own.

Fetching needs the network and perhaps a token; what forks executors must have neither, not even as a
remnant in memory. So this program runs before the zygote, tells where the files are and which commit
they are of, and is gone. Where the hub cannot be reached, a copy fetched earlier serves. A folder's
commit is taken from its contents, as the relay's hub takes it (`objects.repository`).

    python -m edif_hpc.worker.engine.fetch CONTROL_FD SOURCE [REVISION]
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edif_hpc.errors import EngineError
from edif_hpc.objects.repository import read_manifest
from edif_hpc.worker.engine.messages import Fetched, Loading, Refused
from edif_hpc.worker.engine.protocol import FROM_ZYGOTE_BYTES, Channel

_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.vocab", "*.py")

Report = Callable[[int, int], None]


def main(arguments: list[str]) -> int:
    """Say where the files are, and of which commit."""
    control_fd, source, revision = int(arguments[0]), arguments[1], (*arguments, None)[2]
    channel = Channel(socket.socket(fileno=control_fd), accepts=(), send_limit=FROM_ZYGOTE_BYTES)
    report = _reporter(channel)
    report(0, 0)
    try:
        channel.send(_found(Path(source)) or _fetched(source, revision, report))
    except Exception as error:  # noqa: BLE001 - a process main: whatever stops it is reported
        text = f"cannot have {source!r} at revision {revision!r}: {error}"
        channel.send(Refused(code=EngineError.code, message=text[:4000]))
        return 1
    return 0


def _found(folder: Path) -> Fetched | None:
    """Return what lies in a folder, if `folder` is one."""
    if not folder.is_dir():
        return None
    return Fetched(folder=str(folder.resolve()), commit=read_manifest(folder).commit)


def _fetched(repository: str, revision: str | None, report: Report) -> Fetched:
    """Fetch one commit of `repository`; its folder in the cache is named by it."""
    import httpx  # noqa: PLC0415 - heavy, and not needed for a folder
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled  # noqa: PLC0415

    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True)
    except (httpx.TransportError, OfflineModeIsEnabled) as error:
        try:
            folder = snapshot_download(repository, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
        return Fetched(folder=folder, commit=Path(folder).name)
    names = [file.rfilename for file in info.siblings or []]
    weights = "*.safetensors" if any(n.endswith(".safetensors") for n in names) else "*.bin"
    folder = snapshot_download(
        repository,
        revision=info.sha,
        allow_patterns=[*_SMALL_FILES, weights],
        tqdm_class=_counting(report),
    )
    return Fetched(folder=folder, commit=info.sha)


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
