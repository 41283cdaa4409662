"""What an operator calls a model, checked before the relay is asked.

The Hub's names are `org/name`; nnsight sends them in the Hub's own spelling, so a short form such as `gpt2` would never be
asked for by anybody. A folder is served under its own path, which only clients that know it can name: to serve a folder
under a Hub name, give the name and `--source`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from edif_hpc.domain.adapter import Adapter
from edif_hpc.domain.deployment import check_name
from edif_hpc.errors import InvalidInput

_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_HUB = re.compile(rf"{_PART}/{_PART}")


def deployment_of(model: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The body that asks for a deployment of `model`."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    if "tasks" in given:
        given["task"], *more = given.pop("tasks")
        given |= {"more_tasks": more} if more else {}
    if "adapters" in given:
        given["adapters"] = [_adapter(text) for text in given["adapters"]]
    if given.get("name"):
        try:
            check_name(given["name"])
        except InvalidInput as error:
            raise click.BadParameter(str(error)) from error
    if not looks_like_a_path(model):
        return {"repo_id": _hub_name(model), **given}
    if "source" in given:
        raise click.UsageError(
            f"{model} is a folder; give --source with a name of the form ORG/NAME"
        )
    folder = str(_folder(model))
    return {"repo_id": folder, "source": folder, **given}


def looks_like_a_path(text: str) -> bool:
    """Whether a model is meant as a folder."""
    return text.startswith(("/", "./", "../", "~")) or text in {".", ".."} or Path(text).is_dir()


def looks_like_a_model(text: str) -> bool:
    """Whether it is a model, not the name of a deployment, which has no slash."""
    return "/" in text or looks_like_a_path(text)


def _hub_name(text: str) -> str:
    if not _HUB.fullmatch(text):
        raise click.BadParameter(
            f"{text!r} is neither ORG/NAME as the Hub spells it (gpt2 is openai-community/gpt2) nor a folder here"
        )
    return text


def _adapter(text: str) -> dict[str, Any]:
    """The body that lists an adapter."""
    try:
        adapter = Adapter.parse(text)
    except InvalidInput as error:
        raise click.BadParameter(str(error)) from error
    return {"repo_id": _hub_name(adapter.repo_id), "revision": adapter.revision}


def _folder(text: str) -> Path:
    folder = Path(text).expanduser().absolute()
    if not (folder / "config.json").is_file():
        raise click.BadParameter(
            f"the folder {folder} holds no config.json, so it is no model of transformers"
        )
    return folder
