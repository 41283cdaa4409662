"""What `edif-hpc env` shows: where requests run, in words, and next to the Python that runs this command.

Versions of this machine are looked up without importing anything, so it works where torch is not installed. A difference is
worth a warning where it can change numbers or break what is sent: in Python, and in the libraries of `_NUMBERS`. Builds of one
version (`2.13.0+cu126` and `2.13.0+cpu`) count as equal: they differ in the device that they compute on, which is told anyway.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from typing import Any, Final

from edif_hpc.cli.api import Api
from edif_hpc.domain.limits import amount
from edif_hpc.errors import NotFound

#: By import name; what differs here may change numbers, or what is understood of a request.
_NUMBERS: Final = ("torch", "transformers", "nnsight", "tokenizers", "numpy", "peft")
#: What researchers ask for first, with the name of the distribution where it is another one.
_USUAL: Final[Mapping[str, str]] = {
    "torch": "torch",
    "transformers": "transformers",
    "nnsight": "nnsight",
    "numpy": "numpy",
    "pandas": "pandas",
    "einops": "einops",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "datasets": "datasets",
    "accelerate": "accelerate",
    "peft": "peft",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
}
_SIGNS: Final = {"yes": "+", "no": "-"}

Facts = dict[str, Any]


def asked(api: Api, deployment: str | None) -> list[Facts]:
    """What the relay tells, of all deployments or of those with this name or model."""
    found: list[Facts] = api.get("/api/env")["deployments"]
    if deployment is None:
        return found
    mine = [each for each in found if deployment in (each["name"], each["repo_id"])]
    if not mine:
        known = ", ".join(each["name"] for each in found) or "none"
        raise NotFound(f"there is no deployment {deployment!r}; there are: {known}")
    return mine


def shown(facts: Facts, *, packages: bool, compare: bool) -> Iterator[str]:
    """The lines about one deployment."""
    yield _title(facts)
    if not facts["workers"]:
        yield "  no worker is warm, so nothing is known of where it will run"
        return
    yield from _versions(facts, packages=packages)
    yield from _more(facts)
    yield "  limits of a request with your token:"
    yield from _limits(facts)
    yield from _allowed(facts)
    if compare:
        yield from _comparison(compared(facts))


def compared(facts: Facts) -> Facts:
    """How this Python differs from the deployment's: by name, the version here and there."""
    here = {name: _installed(_USUAL[name]) for name in _NUMBERS} | {
        "python": platform.python_version()
    }
    there = {name: facts["packages"].get(name) for name in _NUMBERS} | {"python": _python(facts)}
    known = facts["workers"] > 0
    return {
        "differences": {
            name: {"here": version, "there": there[name]}
            for name, version in here.items()
            if known and version and there[name] and not _same(name, version, there[name])
        },
        "not_here": [
            name for name, version in here.items() if known and there[name] and not version
        ],
    }


def _title(facts: Facts) -> str:
    revision = f"@{facts['revision']}" if facts["revision"] else ""
    title = f"{facts['name']}: {facts['repo_id']}{revision}, {facts['dtype']}"
    if not facts["workers"]:
        return title
    unverified = ", unverified" if facts["unverified"] else ""
    return f"{title} on {facts['device']}, isolation {facts['isolation']}{unverified}"


def _versions(facts: Facts, *, packages: bool) -> Iterator[str]:
    there: dict[str, str] = facts["packages"]
    yield f"  python {_python(facts)}"
    if packages:
        yield from (f"  {name} {there[name]}" for name in sorted(there, key=str.lower))
        return
    usual = [f"{name} {there[name]}" for name in _USUAL if name in there]
    absent = [name for name in _USUAL if name not in there]
    yield f"  {', '.join(usual)}"
    rest = len(there) - len(usual)
    yield f"  {rest} more: edif-hpc env {facts['name']} --packages"
    if absent:
        yield f"  not there: {', '.join(absent)}"


def _more(facts: Facts) -> Iterator[str]:
    told = {
        "stores (read-only)": facts["stores"],
        "libraries (after the image's own)": facts["libraries"],
        "tasks": facts["tasks"],
        "attention": facts["attention"],
        "adapters": facts["adapters"],
    }
    for what, items in told.items():
        yield f"  {what}: {', '.join(items) or 'none'}"


def _limits(facts: Facts) -> Iterator[str]:
    for name, told in facts["limits"].items():
        by = f", set by {told['set_by']}" if told["set_by"] else ""
        yield f"    {name:<17}  {amount(name, told['value'])}{by}"


def _allowed(facts: Facts) -> Iterator[str]:
    yield f"  at level {facts['isolation']} a request may (+), may not (-), or is not kept from it (?):"
    for each in facts["rules"]:
        note = f": {each['note']}" if each["note"] else ""
        yield f"    {_SIGNS.get(each['verdict'], '?')} {each['what']}{note}"


def _comparison(found: Facts) -> Iterator[str]:
    for name, versions in found["differences"].items():
        yield f"  WARN  {name} is {versions['here']} here and {versions['there']} there: numbers may differ"
    if found["not_here"]:
        yield f"  not installed here, so not compared: {', '.join(found['not_here'])}"
    elif not found["differences"]:
        yield f"  this Python has the same versions of {', '.join(_NUMBERS)}"


def _python(facts: Facts) -> str:
    return str(facts["python_version"]).partition(" ")[0]


def _same(name: str, here: str, there: str) -> bool:
    if name == "python":  # nnsight ships source, so a patch release makes no difference
        return here.split(".")[:2] == there.split(".")[:2]
    return here.partition("+")[0] == there.partition("+")[0]


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
