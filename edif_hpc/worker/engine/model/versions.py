"""Which versions of the libraries the engine serves with.

nnsight reads what transformers says about a task. A transformers that says it in another way still
loads here, and fails in half of nnsight: whoever builds a model without weights, as every client does,
hears that no tokenizer can be guessed. Numbers are promised for what was tested, so the zygote looks at
what is installed before it imports it. The package demands the same versions; but an image can be
changed after it was built.
"""

from __future__ import annotations

from importlib.metadata import version

from packaging.specifiers import SpecifierSet

from edif_hpc.errors import EngineError

#: transformers 5.23 names the class of a task by a string, of which nnsight 0.8 makes nothing.
SERVED = {"nnsight": "==0.8.*", "transformers": ">=5.19,<5.23"}


def check() -> None:
    """Look at what is installed.

    Raises:
        EngineError: a library has a version that the engine cannot serve with.
    """
    for library, wanted in SERVED.items():
        judge(library, version(library), wanted)


def judge(library: str, found: str, wanted: str) -> None:
    """Raise `EngineError` unless the version `found` is a `wanted` one."""
    if not SpecifierSet(wanted).contains(found, prereleases=True):
        raise EngineError(
            f"{library} {found} is installed, but this worker serves only with {library}{wanted}; "
            f"install it where the worker runs: pip install '{library}{wanted}'"
        )
