"""Ends a command that reads from afar at once: no server is waited for that does not answer."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nxdi_expertscale.cli.exit_status import ExitStatus
from nxdi_expertscale.cli.output import flush_streams, print_message


def describe_interrupt(*, can_go_on: bool) -> str:
    """What is said when a command is interrupted."""
    return "interrupted" + ("; the same command goes on from here" if can_go_on else "")


@contextmanager
def ending_at_once(*, can_go_on: bool) -> Iterator[None]:
    """End the process at the first signal, without a word to its threads.

    They may be in the middle of a request, where nothing reaches them. What is on disk and in S3
    is whole at any moment, as it has to be for a process that is killed.

    Args:
        can_go_on: Whether the same command goes on where it was.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        try:
            print_message(describe_interrupt(can_go_on=can_go_on))
            flush_streams()
        finally:
            os._exit(ExitStatus.INTERRUPTED)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
