"""The page docs/reference/attacks.md, made from the tables that the tests run.

python -m edif_hpc.testing.attacks.page > docs/reference/attacks.md
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Final

from edif_hpc.testing.attacks import expected
from edif_hpc.testing.attacks.expected import CASES, GUARDS, Case
from edif_hpc.testing.attacks.knocks import BLOBS, KNOCKS
from edif_hpc.worker.engine.values import Level

_OPENING: Final = f"""# Attacks

What a hostile researcher tries, and what comes of it at each [level](../concepts/isolation.md#levels). Each line is a test: the attempt is
sent by an unmodified nnsight client, through a relay, to a worker that runs as an ordinary user, and every file and process that it
is after belongs to that same user. After each, a request that means no harm has the same bits as before all of them, all processes but
the executor's are the ones that were there, and nothing is left of the attempt.

Made by `python -m edif_hpc.testing.attacks.page` from the tables that `tests/acceptance/test_strangers.py` runs: {len(CASES)} attempts inside a
request at each of {len(Level)} levels, {len(BLOBS)} requests that are bombs, {len(KNOCKS)} attempts at the relay's door.

| outcome | means |
|---|---|
| denied | the system refused it inside, as an ordinary error |
| gone | it happened in the process of the request alone, and went with it |
| user, oom, timeout, limit, crash | the request ended with an ERROR of this kind |
| **allowed** | it is not prevented at this level |

Where two outcomes stand, it depends on the machine, or on which of two walls is met first.
"""
_GROUPS: Final = {
    "Files of others": expected.FILES,
    "Other processes, and the kernel": expected.PROCESSES,
    "The network": expected.NETWORK,
    "Exhaustion": expected.EXHAUSTION,
    "No end, or a sudden one": expected.ENDS,
    "What the next request would find": expected.TRACES,
    "Results, and frames to the worker": expected.RESULTS,
}
_LAYERS: Final = """
## Layers

That each wall is needed is tested as well (`tests/integration/worker/test_layers.py`): with all others in place and this one left out, at
the level `full`, this attempt comes out otherwise.

| without | comes through |
|---|---|"""
_BOMBS: Final = """
## Requests that are bombs

What a client sends is opened by the executor alone. The request ends with an ERROR of one of these kinds, at each level.

| the request is | ends in |
|---|---|"""
_DOOR: Final = """
## At the relay's door

Raw HTTP by somebody with a researcher's token. The relay goes on serving, answers with one of these codes (0: it closes the connection),
and neither its log nor what `edif-hpc` shows obeys what was sent. Floods and slow clients are tested in
`tests/integration/relay_http/test_surface.py`.

| attempt | answer |
|---|---|"""


def page() -> str:
    """The whole page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _OPENING.rstrip()
    for title, cases in _GROUPS.items():
        yield f"\n## {title}\n\n| attempt | {' | '.join(Level)} |\n|---{'|---' * len(Level)}|"
        yield from map(_row, cases)
    yield _LAYERS
    yield from (f"| {layer} | {name} |" for layer, name in GUARDS.items())
    yield _BOMBS
    yield from (f"| {name} | {_either(kinds)} |" for name, (_, kinds) in BLOBS.items())
    yield _DOOR
    yield from (
        f"| {each.name} | {_either(frozenset(map(str, each.refused)))} |" for each in KNOCKS
    )


def _row(case: Case) -> str:
    return f"| {case.name} | {' | '.join(_either(case.outcomes[level]) for level in Level)} |"


def _either(outcomes: frozenset[str]) -> str:
    return " or ".join("**allowed**" if each == "allowed" else each for each in sorted(outcomes))


if __name__ == "__main__":
    sys.stdout.write(page())
