"""The founding of a relay: its data directory, and the settings file that lets this user run and reach it.

The first operator token exists as text only once. It is written into the settings file (0600) unless that already
speaks of a relay; then it is shown, because a settings file is not ours to change.
"""

from __future__ import annotations

import importlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from edif_hpc.cli.context import Context
from edif_hpc.errors import SettingsError
from edif_hpc.settings import RelaySettings


def relay_app() -> ModuleType:
    """The relay's main module, which needs the libraries of the extra `relay`."""
    try:
        return importlib.import_module("edif_hpc.relay.app")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("edif_hpc"):
            raise
        raise SettingsError(
            f"this machine lacks {error.name}, which a relay needs; install it with: pip install 'edif-hpc[relay]'"
        ) from error


def found(ctx: Context, *, operator_name: str, flags: Mapping[str, Any]) -> Iterator[str]:
    """Make the relay and its settings file; yields what to tell the operator."""
    file = ctx.config_file
    _make_private(file)  # first: a token that cannot be kept must not be made
    known = _tables(file)
    settings = ctx.relay_settings(flags)
    token = relay_app().init_data_dir(settings, operator_name=operator_name)
    yield f"made a relay in {settings.data_dir}"
    given = {name: value for name, value in flags.items() if value is not None}
    new: dict[str, dict[str, Any]] = {}
    if "relay" not in known and given:
        new["relay"] = given
    if "client" not in known:
        new["client"] = {"relay": _address(settings), "token": token}
    _append(file, new)
    yield _kept(file, token, in_file="client" in new)
    yield "next:"
    yield f"  edif-hpc relay serve{'' if 'relay' in new else _as_flags(given)}"
    yield "  edif-hpc up ORG/MODEL        # in a second terminal: add a model and start a worker"
    yield "  edif-hpc token create NAME   # a token for a researcher"


def _kept(file: Path, token: str, *, in_file: bool) -> str:
    if in_file:
        return f"wrote the operator token to {file} (0600)"
    return f"{file} has a [client] table, which stays as it is; to use this relay: export EDIF_TOKEN={token}"


def _address(settings: RelaySettings) -> str:
    scheme = "https" if settings.tls else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return settings.public_url or f"{scheme}://{host}:{settings.port}"


def _tables(file: Path) -> frozenset[str]:
    try:
        return frozenset(tomllib.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return frozenset()
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the settings file {file} cannot be used: {error}; mend or move it first"
        ) from error


def _make_private(file: Path) -> None:
    """Make the settings file if there is none, and see to it that nobody else can read it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file.touch(mode=0o600)
        file.chmod(0o600)
    except OSError as error:
        raise SettingsError(
            f"the settings file {file} cannot be written: {error.strerror}; name another with --config"
        ) from error


def _append(file: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    with file.open("a", encoding="utf-8") as stream:
        for name, values in tables.items():
            lines = (f"{key} = {_toml(value)}\n" for key, value in values.items())
            stream.write(f"\n[{name}]\n{''.join(lines)}")


def _toml(value: str | int | Path) -> str:
    """A TOML value; its basic strings escape as JSON's do."""
    if isinstance(value, int):
        return str(value)
    return json.dumps(
        str(value.absolute() if isinstance(value, Path) else value), ensure_ascii=False
    )


def _as_flags(flags: Mapping[str, Any]) -> str:
    return "".join(f" --{name.replace('_', '-')} {value}" for name, value in flags.items())
