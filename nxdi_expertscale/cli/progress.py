"""Progress on stderr: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nxdi_expertscale.cli.output import print_message
from nxdi_expertscale.display.progress import Pace, Progress, TerminalBar


@contextmanager
def progress_bar(what: str, *, in_bytes: bool = True) -> Iterator[Progress]:
    """Show a bar with what is done and the time left; where stderr is no terminal, lines with it.

    Args:
        what: The work, a word or two.
        in_bytes: Whether amounts are bytes; otherwise they are steps.

    Yields:
        A function to call with what is done and the total.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield LogLines(what, in_bytes=in_bytes)
        return
    bar = TerminalBar(what, in_bytes=in_bytes, stream=sys.stderr)
    try:
        yield bar
    finally:
        bar.close()


class LogLines:
    """Progress as lines of a log: one for each tenth of the work, and none of what is quick."""

    _SECONDS = 30.0
    """From line to line, at the least."""

    def __init__(
        self,
        what: str,
        *,
        in_bytes: bool,
        write: Callable[[str], None] = print_message,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin; the rate is counted from now on.

        Args:
            what: The work, a word or two.
            in_bytes: Whether amounts are bytes; otherwise they are steps.
            write: Takes each line.
            clock: Gives seconds.
        """
        self._what, self._write = what, write
        self._pace = Pace(in_bytes=in_bytes, clock=clock)
        self._lock = threading.Lock()
        self._shown_at = self._pace.started
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        """Write a line if it is time for one; any thread may call it."""
        with self._lock:
            tenth, now = 10 * done // max(total, 1), self._pace.clock()
            if tenth <= self._shown or now - self._shown_at < self._SECONDS:
                return
            self._shown, self._shown_at = tenth, now
        self._write(f"{self._what}: {self._pace.describe(done, total)}")
