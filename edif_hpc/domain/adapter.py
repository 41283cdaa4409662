"""Adapters: small sets of weights that a request may have attached to the deployed model.

An adapter decides what a request computes, and a worker would have to fetch it, so a deployment lists those that it serves.
The list has exact names and no patterns: every worker fetches all of them before it is warm, which it can do only for names
that it is told. A client names an adapter without a revision (nnsight sends `peft="org/name"`), so the revision is the
operator's to pin; without one a worker takes the newest commit at its start, and each result tells which one that was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from edif_hpc.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A repository of the Hub, and the commit, tag or branch to take; `revision` None is the default branch."""

    repo_id: str
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """Read what `str` writes: REPO or REPO@REVISION."""
        repo_id, at, revision = text.partition("@")
        if not repo_id or (at and not revision):
            raise InvalidInput(f"the adapter {text!r} is not of the form ORG/NAME[@REVISION]")
        return cls(repo_id=repo_id, revision=None if revision in {"", "main"} else revision)

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"


def each_once(adapters: Iterable[Adapter]) -> tuple[Adapter, ...]:
    """The adapters as a deployment keeps them; raise `InvalidInput` for a name that comes twice."""
    listed = tuple(adapters)
    twice = [name for name, count in Counter(each.repo_id for each in listed).items() if count > 1]
    if twice:
        raise InvalidInput(
            f"the adapter {twice[0]!r} is listed twice; a client names it without a revision, so one can be served"
        )
    return listed
