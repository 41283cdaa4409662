"""A scheduler that takes what is submitted, and remembers it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from edif_hpc.slurm.submit import Submission


@dataclass
class FakeSubmitter:
    """Answers with what `outcome` gives, or raises what it raises."""

    outcome: Callable[[], str]
    taken: list[Submission] = field(default_factory=list)

    def submit(self, submission: Submission) -> str:
        """Take one; returns the id of its job."""
        self.taken.append(submission)
        return self.outcome()
