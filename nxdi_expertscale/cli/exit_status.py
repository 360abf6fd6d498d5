"""The exit statuses of every command."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """How a command ended."""

    GOOD = 0
    ANSWER_IS_NO = 1
    """``verify`` found a fault, or ``doctor`` a problem."""
    BAD_REQUEST = 2
    """The command line, the input or the machine is such that it cannot be done."""
    DEFECT = 70
    """A defect of this package (``EX_SOFTWARE`` of ``sysexits.h``)."""
    INTERRUPTED = 130
    """Ctrl-C or SIGTERM."""
