"""Bringing a result home: in pieces if the connection is cut, unpacked, and whole or not at all.

The bytes come from a signed link, which needs no token and may lead to another server than the relay. They are collected
beside the target in a `.part` file; when the connection is cut, a new link is asked for and the rest is asked for by its
range. Only the complete result is moved to its name. This needs no torch: what is in the file is for its owner to load.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import click
import httpx

from edif_hpc.cli.api import Api, check, part, unreachable
from edif_hpc.cli.show import Progress, size
from edif_hpc.cli.watch import watch
from edif_hpc.errors import Conflict, EdifError, Unavailable

IDLE_TRIES = 5
_TIMEOUT_S = 60.0
_FINAL = ("COMPLETED", "ERROR")


class RequestFailed(EdifError):
    """A request ended without a result."""

    code = "request_failed"


def result_of(api: Api, request_id: str, out: Path, *, wait: bool) -> Path:
    """Download a result to `out`; returns where it is, with `.zst` added if it could not be unpacked here."""
    if out.exists():
        raise click.UsageError(f"{out} exists; name another file with --out, or remove it")
    path = f"/api/requests/{part(request_id)}"
    _check_end(_wait_for_end(api, path) if wait else api.get(path))
    collected = out.with_name(f".{out.name}.{request_id[:8]}.part")
    link = _collect(api, f"{path}/result", collected)
    return _unpack(collected, out) if link["compress"] else collected.rename(out)


def _wait_for_end(api: Api, path: str) -> dict[str, Any]:
    progress = Progress()
    found: dict[str, Any] = {}
    for found in watch(lambda: api.get(path)):
        progress.tell(f"{found['shown']}: {_first_line(found['description'])}")
        if found["state"] in _FINAL:
            break
    progress.end()
    return found


def _check_end(found: dict[str, Any]) -> None:
    if found["state"] not in _FINAL:
        raise Conflict(
            f"request {found['id']} is {found['shown']} ({_first_line(found['description'])}); wait for it with --wait"
        )
    if found["state"] == "ERROR":
        raise RequestFailed(
            f"request {found['id']} ended in an error: {_last_line(found['description'])} (all of it: "
            f"edif-hpc request show {found['id']})"
        )


def _collect(api: Api, path: str, collected: Path) -> dict[str, Any]:
    """Fill the part file, over as many connections as that takes; returns the last link."""
    idle, progress = 0, Progress()
    while True:
        link: dict[str, Any] = api.get(path)
        before = _size(collected)
        if before == link["size_bytes"]:
            progress.end()
            return link
        try:
            _append(link["url"], collected, before, link["size_bytes"], progress)
        except httpx.HTTPError as error:
            idle = 0 if _size(collected) > before else idle + 1
            if idle >= IDLE_TRIES:
                raise unreachable(
                    str(httpx.URL(link["url"]).copy_with(query=None)), error
                ) from error


def _append(url: str, collected: Path, start: int, total: int, progress: Progress) -> None:
    headers = {"range": f"bytes={start}-"} if start else {}
    # The link is its own credential, so no token goes with it.
    with httpx.stream("GET", url, headers=headers, timeout=_TIMEOUT_S) as response:
        if not response.is_success:
            response.read()
            check(response)
        goes_on = response.status_code == httpx.codes.PARTIAL_CONTENT
        with collected.open("ab" if goes_on else "wb") as file:
            for piece in response.iter_raw():  # unbuffered: what has come is kept when it is cut
                file.write(piece)
                progress.tell(f"{size(file.tell())} of {size(total)}", passing=True)
    if _size(collected) > total:
        collected.unlink()
        raise Unavailable(
            f"{url.partition('?')[0]} sent more than the {total} bytes of the result; run it again"
        )


def _unpack(collected: Path, out: Path) -> Path:
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError:
        return collected.rename(out.with_name(f"{out.name}.zst"))
    unpacked = collected.with_suffix(".unpacked")
    try:
        with collected.open("rb") as source, unpacked.open("wb") as target:
            zstandard.ZstdDecompressor().copy_stream(source, target)
    except zstandard.ZstdError as error:
        unpacked.unlink()
        raise RequestFailed(
            f"the result in {collected} does not unpack ({error}); remove it and run again"
        ) from error
    collected.unlink()
    return unpacked.rename(out)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _last_line(text: str) -> str:
    return text.rstrip().rpartition("\n")[2]
