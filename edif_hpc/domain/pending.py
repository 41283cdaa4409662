"""Why a scheduler lets a job wait, in words that say what to do.

A batch system names a reason for each pending job. Most mean that the cluster is busy, and time mends them. Some mean that
the job can never start as it was asked for: sbatch accepts it all the same, and it would wait for ever. Some mean a limit on how
much one account may run at once: then a successor cannot start before its predecessor has ended, however early it was
ordered. The names are Slurm's; one that is not listed counts as busy, because waiting is the answer that does no harm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Hindrance(StrEnum):
    """What kind of thing keeps a job from starting."""

    BUSY = "busy"  #: others are first, or the resources are in use
    LIMIT = "limit"  #: something of ours has to end first
    HELD = "held"  #: a person holds it
    NEVER = "never"  #: it cannot start as it was asked for


@dataclass(frozen=True, kw_only=True)
class Pending:
    """A scheduler's reason, understood."""

    kind: Hindrance
    advice: str = ""


_WALLTIME = "ask for a shorter walltime: edif-hpc up --walltime"
_ACCOUNT = "correct the account, QOS or partition in the site's profile"
_SIZE = "ask for fewer GPUs, or for another kind: edif-hpc up --gpus, --gpu"
_LIMIT = (
    "a limit on running jobs keeps it waiting until one of ours ends; ask the site for a higher "
    "limit, or expect a gap at each end of a walltime"
)

_RULES: tuple[tuple[str, Hindrance, str], ...] = (
    (r"PartitionTimeLimit|.*MaxWall.*", Hindrance.NEVER, _WALLTIME),
    (r"PartitionNodeLimit|BadConstraints|.*Max\w+PerJob.*", Hindrance.NEVER, _SIZE),
    (r"Invalid(Account|QOS)|PartitionConfig|AccountNotAllowed|QOSNotAllowed",
     Hindrance.NEVER, _ACCOUNT),
    (r"DependencyNeverSatisfied|.*GrpWall.*|.*(GRES|TRES|CPU|GPU)Minutes.*|.*UsageThreshold",
     Hindrance.NEVER, "the allowance is used up, or what it depends on failed: ask the site"),
    (r"JobHeld(User|Admin)|JobHoldMaxRequeue", Hindrance.HELD, "release it: scontrol release"),
    (r"(QOS|Assoc)(Max|Grp)\w+|Max\w+Per(User|Account)|Licenses", Hindrance.LIMIT, _LIMIT),
)  # fmt: skip


def understand(reason: str) -> Pending:
    """What a pending reason means; the parentheses that squeue puts around it do not matter."""
    word = reason.strip().strip("()").partition(",")[0]
    for pattern, kind, advice in _RULES:
        if re.fullmatch(pattern, word):
            return Pending(kind=kind, advice=advice)
    return Pending(kind=Hindrance.BUSY)
