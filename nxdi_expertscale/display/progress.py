"""How far a long call has come: a bar for who looks on, in a terminal or a notebook."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import IO, Any, Protocol, cast

from rich import filesize

Progress = Callable[[int, int], None]
"""Called with how much is done and how much there is: bytes, layers, or steps of training."""


class Bar(Protocol):
    """Shows how far a task has come."""

    def __call__(self, done: int, total: int) -> None:
        """Show it; any thread may call this."""

    def close(self) -> None:
        """Leave what is shown as it is."""


@contextmanager
def showing(
    progress: Progress | bool | None, what: str, *, in_bytes: bool = True
) -> Iterator[Progress | None]:
    """Show the progress of a call as its caller wants it.

    Args:
        progress: A function to call instead; True for a bar where somebody looks on, in a terminal
            or a notebook; False or None for nothing.
        what: The work, a word or two.
        in_bytes: Whether amounts are bytes; otherwise they are steps.

    Yields:
        A function to call with what is done and the total; None if nobody wants to know.
    """
    if callable(progress):
        yield progress
        return
    bar = find_bar(what, in_bytes=in_bytes) if progress else None
    try:
        yield bar
    finally:
        if bar is not None:
            bar.close()


def find_bar(what: str, *, in_bytes: bool) -> Bar | None:
    """A bar for the terminal or the notebook that this process has; None if it has neither."""
    display = _display_of_notebook()
    if display is not None:
        return NotebookBar(what, in_bytes=in_bytes, display=display)
    if sys.stderr is not None and sys.stderr.isatty():
        return TerminalBar(what, in_bytes=in_bytes, stream=sys.stderr)
    return None


class Pace:
    """How far, how quick, how long: the words of every progress that is text."""

    def __init__(self, *, in_bytes: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin; the rate is counted from now on.

        Args:
            in_bytes: Whether amounts are bytes; otherwise they are steps.
            clock: Gives seconds.
        """
        self.clock = clock
        self.started = clock()
        self._amount = filesize.decimal if in_bytes else "{:,}".format

    def describe(self, done: int, total: int) -> str:
        """Say it in one line."""
        seconds = self.clock() - self.started
        said = f"{100 * done // max(total, 1)}%, {self._amount(done)} of {self._amount(total)}"
        if not done or seconds <= 0:
            return said
        rate = done / seconds
        left = timedelta(seconds=round((total - done) / rate))
        return f"{said}, {self._amount(round(rate))} a second, {left} left"


class TerminalBar:
    """A bar on a terminal. It appears with the first progress, and not before an error."""

    def __init__(self, what: str, *, in_bytes: bool, stream: IO[str]) -> None:
        """Prepare a bar.

        Args:
            what: The work, a word or two.
            in_bytes: Whether amounts are bytes; otherwise they are steps.
            stream: The terminal. That it is closed meanwhile ends the bar and not the work.
        """
        self._what, self._in_bytes = what, in_bytes
        self._stream = stream
        self._lock = threading.Lock()
        self._shown: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show how far it has come."""
        with self._lock:
            if self._shown is None:
                self._open()
        self._shown.update(self._task, completed=done, total=total)

    def _open(self) -> None:
        from rich import progress as bars
        from rich.console import Console

        measure: tuple[bars.ProgressColumn, ...] = (bars.MofNCompleteColumn(),)
        if self._in_bytes:
            measure = (bars.DownloadColumn(), bars.TransferSpeedColumn())
        self._shown = bars.Progress(
            bars.TextColumn("[progress.description]{task.description}"),
            bars.BarColumn(),
            *measure,
            bars.TimeRemainingColumn(),
            console=Console(file=cast(IO[str], _Terminal(self._stream)), force_jupyter=False),
        )
        self._task = self._shown.add_task(self._what, total=None)
        self._shown.start()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._shown is not None:
            self._shown.stop()


class NotebookBar:
    """A bar below the cell of a notebook, which needs no widgets."""

    _SECONDS = 0.25
    """From one update to the next, at the least."""

    def __init__(
        self,
        what: str,
        *,
        in_bytes: bool,
        display: Callable[..., Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare a bar.

        Args:
            what: The work, a word or two.
            in_bytes: Whether amounts are bytes; otherwise they are steps.
            display: IPython's function of that name.
            clock: Gives seconds.
        """
        self._what, self._display = what, display
        self._pace = Pace(in_bytes=in_bytes, clock=clock)
        self._lock = threading.Lock()
        self._handle: Any = None
        self._shown_at = 0.0

    def __call__(self, done: int, total: int) -> None:
        """Show how far it has come, if it is time to."""
        with self._lock:
            now = self._pace.clock()
            if self._handle is not None and done < total and now - self._shown_at < self._SECONDS:
                return
            self._shown_at = now
            text = f"{self._what}: {self._pace.describe(done, total)}"
            content = {
                "text/plain": text,
                "text/html": f'<progress value="{done}" max="{max(total, 1)}"></progress> {text}',
            }
            if self._handle is None:
                self._handle = self._display(content, raw=True, display_id=True)
            else:
                self._handle.update(content, raw=True)

    def close(self) -> None:
        """Leave the bar as it is."""


def _display_of_notebook() -> Callable[..., Any] | None:
    """IPython's ``display`` where this process is the kernel of a notebook."""
    # A notebook has it imported, and importing it elsewhere would cost a second.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython import display

    show: Callable[..., Any] = display.display
    return show


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
