"""Settings from flags, the environment and the file. This module is the only one that reads the environment."""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from edif_hpc.errors import SettingsError
from edif_hpc.settings.base import Settings
from edif_hpc.settings.client import ClientSettings

SECTIONS = ("relay", "worker", "pilot", "launcher", "client")

_T = TypeVar("_T", bound=Settings)
_YES, _NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


def load(
    cls: type[_T],
    *,
    flags: Mapping[str, Any],
    environ: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> _T:
    """Read the settings of one class.

    Args:
        cls: the settings class.
        flags: what the command line said; None means "not said".
        environ: the environment; None takes this process's own.
        file: the TOML file; None takes `default_file`, which may be missing.
    """
    environ = os.environ if environ is None else environ
    valid = {each.name for each in dataclasses.fields(cls)}
    from_file = _read_file(cls.section, file, environ)
    from_environment = _read_environment(cls.section, environ)
    given = {name: value for name, value in flags.items() if value is not None}
    values: dict[str, Any] = {}
    for source, found in (
        ("the file", from_file),
        ("the environment", from_environment),
        ("the flags", given),
    ):
        unknown = sorted(set(found) - valid)
        if unknown:
            raise SettingsError(
                f"{cls.section}: {', '.join(unknown)} in {source} is no setting; valid are: {', '.join(sorted(valid))}"
            )
        values |= found
    hints = typing.get_type_hints(cls)
    return cls(
        **{
            name: _coerce(f"{cls.section}: {name}", value, hints[name])
            for name, value in values.items()
        }
    )


def load_client(
    *, flags: Mapping[str, Any], environ: Mapping[str, str] | None = None, file: Path | None = None
) -> ClientSettings:
    """Read `ClientSettings`, also from nnsight's own variables.

    `NDIF_HOST` and `NDIF_API_KEY` count last and together, so that a token for one host is never sent to another.
    """
    environ = os.environ if environ is None else environ
    told = {
        name: environ[variable]
        for name, variable in (("relay", "EDIF_RELAY"), ("token", "EDIF_TOKEN"))
        if environ.get(variable)
    }
    told |= {name: value for name, value in flags.items() if value is not None}
    in_file = _read_file(ClientSettings.section, file, environ)
    if "relay" not in told | in_file and environ.get("NDIF_HOST"):
        told["relay"] = environ["NDIF_HOST"]
        if environ.get("NDIF_API_KEY"):
            told.setdefault("token", environ["NDIF_API_KEY"])
    return load(ClientSettings, flags=told, environ=environ, file=file)


def default_file(environ: Mapping[str, str]) -> Path:
    """Where the settings file is: `EDIF_CONFIG`, else below `XDG_CONFIG_HOME`, else below `~/.config`."""
    if environ.get("EDIF_CONFIG"):
        return Path(environ["EDIF_CONFIG"]).expanduser()
    return (
        Path(environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
        / "edif-hpc"
        / "config.toml"
    )


def _read_file(section: str, file: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    path = file or default_file(environ)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if file is None and not environ.get("EDIF_CONFIG"):
            return {}
        raise SettingsError(f"there is no settings file {path}") from None
    except OSError as error:
        raise SettingsError(
            f"the settings file {path} cannot be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise SettingsError(f"the settings file {path} is not TOML: {error}") from error
    unknown = sorted(set(content) - set(SECTIONS))
    if unknown:
        raise SettingsError(
            f"{path} has {', '.join(unknown)}; its tables are: {', '.join(SECTIONS)}"
        )
    table = content.get(section, {})
    if not isinstance(table, dict):
        raise SettingsError(f"{section} in {path} must be a table, [{section}], not {table!r}")
    return table


def _read_environment(section: str, environ: Mapping[str, str]) -> dict[str, str]:
    prefix = f"EDIF_{section.upper()}_"
    return {
        name.removeprefix(prefix).lower(): value
        for name, value in environ.items()
        if name.startswith(prefix)
    }


def _coerce(name: str, value: Any, hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        if value is None or value == "":
            return None
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    try:
        return _convert(value, hint)
    except (TypeError, ValueError):
        raise SettingsError(f"{name} is {value!r}; it must be of type {hint.__name__}") from None


def _convert(value: Any, kind: type) -> Any:
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    if kind is bool and isinstance(value, str) and value.lower() in _YES | _NO:
        return value.lower() in _YES
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind in (int, float) and isinstance(value, int | str) and not isinstance(value, bool):
        return kind(value)
    raise TypeError
