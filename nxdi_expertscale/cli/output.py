"""Prints reports on stdout and messages on stderr, whatever these two are connected to."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from nxdi_expertscale.errors import printable, shorten

PROGRAM = "nxdi-expertscale"

_package = logging.getLogger("nxdi_expertscale")
_messages = logging.getLogger("nxdi_expertscale.messages")


def to_json(result: Any) -> str:
    """Format a result as JSON, for ``--json``.

    Args:
        result: A dataclass. A number in it that JSON cannot hold (infinity, NaN) becomes null.
    """
    return json.dumps(_as_json(dataclasses.asdict(result)), indent=2, allow_nan=False)


def _as_json(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _as_json(part) for key, part in value.items()}
        case list() | tuple():
            return [_as_json(part) for part in value]
        case Path():
            return str(value)
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def print_report(text: str) -> None:
    """Print on stdout what a command found.

    Where stdout is closed, or a pipe whose reader has gone (``| head``), nobody wants to read on,
    and that is no error.

    Args:
        text: Lines that hold no control characters, or whose control characters may be escaped.

    Raises:
        OSError: stdout cannot take it, for instance because its disk is full.
    """
    if sys.stdout is None:
        return
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        _discard(sys.stdout)
    except OSError as error:
        _discard(sys.stdout)
        raise OSError(error.errno, f"cannot print the report: {error.strerror}") from error


def print_message(text: str) -> None:
    """Print one line on stderr, with the program's name before it.

    Where stderr cannot take it there is no place left to say so; the exit status remains.
    """
    line = shorten(printable(text))
    _messages.info("%s", line)
    print_on_stderr(f"{PROGRAM}: {line}")


class MessageHandler(logging.Handler):
    """Prints what the package logs as it prints its messages, one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        print_on_stderr(f"{PROGRAM}: {shorten(printable(record.getMessage()))}")


class LogFile:
    """A file to which messages, and what the package logs, are added with the time."""

    def __init__(self, file: Path) -> None:
        """Open the file.

        Raises:
            OSError: It cannot be opened.
        """
        self._handler = logging.FileHandler(file, encoding="utf-8", errors="backslashreplace")
        self._handler.setFormatter(_OneLine("%(asctime)s %(levelname)s %(message)s"))
        self._level = _package.level
        _package.addHandler(self._handler)
        _package.setLevel(logging.INFO)

    def close(self) -> None:
        """Leave the package's logger as it was."""
        _package.removeHandler(self._handler)
        _package.setLevel(self._level)
        self._handler.close()


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@contextmanager
def warnings_as_messages() -> Iterator[None]:
    """Print the package's warnings, of which the terminal is otherwise not protected."""
    handler = MessageHandler(logging.WARNING)
    _package.addHandler(handler)
    try:
        yield
    finally:
        _package.removeHandler(handler)


def print_on_stderr(text: str) -> None:
    """Print lines on stderr, as far as it can take them."""
    if sys.stderr is None:
        return
    try:
        _write(sys.stderr, text)
    except OSError:
        _discard(sys.stderr)


def _write(stream: TextIO, text: str) -> None:
    lines = "\n".join(map(printable, text.split("\n")))
    encoding = stream.encoding or "utf-8"
    stream.write(lines.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def flush_streams() -> None:
    """Flush stdout and stderr, so that the interpreter finds nothing to fail on at its end."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except OSError:
            _discard(stream)


def _discard(stream: TextIO) -> None:
    """Send what a stream still holds nowhere, so that no later flush fails again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)


def occupy_standard_descriptors() -> None:
    """Open ``/dev/null`` in the place of a stdin, stdout or stderr that is closed.

    Otherwise the next file that is opened gets the descriptor, and what a library prints on it
    lands in a checkpoint.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system gives the lowest descriptor that is free, and that is this one.
            os.open(os.devnull, os.O_RDWR)
