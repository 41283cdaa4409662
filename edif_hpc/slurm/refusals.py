"""What sbatch says when it does not say a job's id, and what that means for whoever asked. Pure.

sbatch ends with the same exit code whatever happened, so its words are all there is. Three kinds of words matter more than
the rest: those that leave open whether the job exists (the controller was asked and its answer got lost), those of a limit
that passes by itself, and those of a controller that is not there. Whatever else Slurm objects to is about what was asked
for, and asking again does not help.
"""

from __future__ import annotations

import re

from edif_hpc.errors import LaunchError, RefusalKind, SubmitRefused, SubmitUnknown

_DOUBT = re.compile(
    r"socket timed out|zero bytes were transmitted|transport endpoint|connection reset|unexpected message received"
    r"|protocol authentication error|broken pipe|incomplete (message|packet)",
    re.IGNORECASE,
)
_KINDS: tuple[tuple[RefusalKind, re.Pattern[str]], ...] = (
    (
        "quota",
        re.compile(
            r"accounting/qos policy|QOS[A-Z]\w*Limit|QOSMax|QOSGrp|Assoc(Max|Grp)\w*|job submit limit|submission limit"
            r"|exceeds? .*limit|maximum number of jobs|too many jobs",
            re.IGNORECASE,
        ),
    ),
    (
        "retry",
        re.compile(
            r"unable to contact slurm controller|controller not responding|standby mode|temporarily unable to accept"
            r"|resource temporarily unavailable|try again|invalid authentication credential|munge|expired credential"
            r"|rate limit|unable to resolve|in maintenance",
            re.IGNORECASE,
        ),
    ),
)
_LIMIT_OF_ASKING = re.compile(
    r"requested time limit is invalid|QOSMaxWall|AssocMaxWall", re.IGNORECASE
)


def refusal(said: str) -> LaunchError:
    """The error for what sbatch said while it failed: `SubmitRefused`, or `SubmitUnknown`."""
    words = " | ".join(line.strip() for line in said.splitlines() if line.strip())
    if not words or _DOUBT.search(words):
        return SubmitUnknown(
            f"sbatch failed and left open whether it submitted: {words or 'it said nothing'}"
        )
    if not _LIMIT_OF_ASKING.search(words):  # such a limit never passes: less must be asked for
        for kind, pattern in _KINDS:
            if pattern.search(words):
                return SubmitRefused(words, kind=kind)
    return SubmitRefused(words, kind="config")
