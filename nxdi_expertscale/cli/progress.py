"""Progress on stderr: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, TYPE_CHECKING, Any, cast

from rich import filesize
from rich import progress as bars
from rich.console import Console

from nxdi_expertscale.cli.output import print_message

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint.parallel import Progress

BYTES = (bars.DownloadColumn(), bars.TransferSpeedColumn())
"""What a bar shows of work that is measured in bytes."""

STEPS = (bars.MofNCompleteColumn(),)
"""What a bar shows of work that is measured in steps."""


@contextmanager
def progress_bar(what: str, measure: Sequence[bars.ProgressColumn] = BYTES) -> Iterator[Progress]:
    """Show a bar with what is done and the time left; where stderr is no terminal, lines with it.

    A terminal that is closed meanwhile ends the bar and not the work.

    Args:
        what: The work, a word or two.
        measure: What to show of the amounts: :data:`BYTES` or :data:`STEPS`.

    Yields:
        A function to call with what is done and the total.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield LogLines(what, in_bytes=measure is BYTES)
        return
    console = Console(file=cast(IO[str], _Terminal(sys.stderr)))
    columns = (
        bars.TextColumn("[progress.description]{task.description}"),
        bars.BarColumn(),
        *measure,
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


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
        self._what, self._write, self._clock = what, write, clock
        self._amount = filesize.decimal if in_bytes else "{:,}".format
        self._lock = threading.Lock()
        self._started = self._shown_at = clock()
        self._shown = 0

    def __call__(self, done: int, total: int) -> None:
        """Write a line if it is time for one; any thread may call it."""
        with self._lock:
            tenth, now = 10 * done // max(total, 1), self._clock()
            if tenth <= self._shown or now - self._shown_at < self._SECONDS:
                return
            self._shown, self._shown_at = tenth, now
        rate = done / (now - self._started)
        left = timedelta(seconds=round((total - done) / rate))
        self._write(
            f"{self._what}: {100 * done // total}%, {self._amount(done)} of {self._amount(total)}, "
            f"{self._amount(round(rate))} a second, {left} left"
        )


class _Terminal:
    """A stream that takes everything, also once the terminal behind it has been closed."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
