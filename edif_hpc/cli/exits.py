"""Exit codes: what a script may branch on.

Each has one meaning, whatever the command. A refusal of the relay keeps its words, so the code only tells whose move it
is: the caller's (USAGE, SETTINGS), the operator's (REFUSED), or nobody's until the relay is back (UNREACHABLE).
"""

from __future__ import annotations

from enum import IntEnum

from edif_hpc import errors


class Exit(IntEnum):
    """The exit codes of `edif-hpc`."""

    OK = 0
    FAILED = (
        1  #: what was asked for did not come about: a request ended in an error, a worker died
    )
    USAGE = 2  #: the command line cannot be understood
    REFUSED = 3  #: the relay answered no
    UNREACHABLE = 4  #: the relay cannot be reached, or cannot serve now
    SETTINGS = 5  #: a setting is unknown, malformed or missing
    INTERRUPTED = 130  #: Ctrl-C


def exit_code(error: errors.EdifError) -> Exit:
    """The exit code of a deliberate error."""
    match error:
        case errors.SettingsError():
            return Exit.SETTINGS
        case errors.Unavailable():
            return Exit.UNREACHABLE
        case errors.InvalidInput() | errors.TransitionRefused():
            return Exit.REFUSED
        case _:
            return Exit.FAILED
