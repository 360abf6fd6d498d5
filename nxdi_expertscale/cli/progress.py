"""Progress bars on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from rich import progress as bars
from rich.console import Console

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint.parallel import Progress

BYTES = (bars.DownloadColumn(), bars.TransferSpeedColumn())
"""What a bar shows of work that is measured in bytes."""

STEPS = (bars.MofNCompleteColumn(),)
"""What a bar shows of work that is measured in steps."""


@contextmanager
def progress_bar(what: str, measure: Sequence[bars.ProgressColumn] = BYTES) -> Iterator[Progress]:
    """Show a bar with what is done and the time left, or nothing where stderr is no terminal.

    A terminal that is closed meanwhile ends the bar and not the work.

    Args:
        what: The work, a word or two.
        measure: What to show of the amounts: :data:`BYTES` or :data:`STEPS`.

    Yields:
        A function to call with what is done and the total.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _done, _total: None
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
