"""Runs the command line and turns whatever becomes of it into an exit status and one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click
from click.shell_completion import shell_complete

from nxdi_expertscale.cli.commands import Invocation, cli
from nxdi_expertscale.cli.exit_status import ExitStatus
from nxdi_expertscale.cli.interrupt import describe_interrupt
from nxdi_expertscale.cli.output import (
    PROGRAM,
    flush_streams,
    occupy_standard_descriptors,
    print_message,
    print_on_stderr,
    warnings_as_messages,
)
from nxdi_expertscale.errors import ExpertScaleError, naming_options, one_line

_Handler = Callable[[int, FrameType | None], object] | int

COMPLETION_VARIABLE = "_NXDI_EXPERTSCALE_COMPLETE"
"""By which a shell asks for completions; the name is click's own for this program."""

_OUT_OF_RESOURCES = ("can't allocate memory", "can't start new thread")
"""In the messages of a RuntimeError: torch's (``c10/core/impl/alloc_cpu.cpp``), and Python's."""


def main(arguments: list[str] | None = None, command: click.Command = cli) -> NoReturn:
    """Run the command line and exit with its status.

    Whatever goes wrong is one line on stderr; the traceback is printed with ``--debug`` alone.

    Args:
        arguments: What follows the program's name; by default the arguments of this process.
        command: The program.

    Raises:
        SystemExit: Always, with one of :class:`ExitStatus`.
    """
    occupy_standard_descriptors()
    invocation = Invocation()
    try:
        # A service that is stopped ends as one at a keyboard that is interrupted.
        with (
            warnings_as_messages(),
            naming_options(),
            _on_signals(signal.default_int_handler, signal.SIGTERM),
        ):
            given = sys.argv[1:] if arguments is None else arguments
            status = _run(command, given, invocation)
    except BaseException as error:  # A panic of a library in Rust is no Exception.
        # No second signal interrupts what is printed of the first.
        with _on_signals(signal.SIG_IGN, signal.SIGTERM, signal.SIGINT):
            status = _explain(error, invocation)
    if invocation.log is not None:
        invocation.log.close()
    flush_streams()
    sys.exit(status)


def _run(command: click.Command, arguments: list[str], invocation: Invocation) -> ExitStatus:
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        shell_complete(command, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
        return ExitStatus.GOOD
    try:
        # Not cli.main, which ends with status 1 where a pipe breaks, and prints an empty line
        # where it is interrupted.
        with command.make_context(PROGRAM, list(arguments), obj=invocation) as context:
            result = command.invoke(context)
    except click.exceptions.Exit as end:
        return ExitStatus(end.exit_code)
    return result if isinstance(result, ExitStatus) else ExitStatus.GOOD


@contextmanager
def _on_signals(handler: _Handler, *numbers: signal.Signals) -> Iterator[None]:
    """Handle some signals in this way, and afterwards as before."""
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _explain(error: BaseException, invocation: Invocation) -> ExitStatus:
    """Print what became of a command that raised, in one line, and give its status."""
    if invocation.debug:
        print_on_stderr("".join(traceback.format_exception(error)).rstrip())
    match error:
        case KeyboardInterrupt() | click.Abort():
            print_message(describe_interrupt(can_go_on=invocation.can_go_on))
            return ExitStatus.INTERRUPTED
        case click.UsageError():
            command = error.ctx.command_path if error.ctx is not None else PROGRAM
            print_message(f"{' '.join(error.format_message().split())} (see {command} --help)")
            return ExitStatus.BAD_REQUEST
        case ExpertScaleError() | OSError():
            print_message(one_line(error))
            return ExitStatus.BAD_REQUEST
        case MemoryError():
            return _explain_lack_of_memory()
        case RuntimeError() if any(text in str(error) for text in _OUT_OF_RESOURCES):
            return _explain_lack_of_memory()
    print_message(
        f"unexpected {one_line(error)}; this is a defect of {PROGRAM}: please report it, with "
        "what the same command prints with --debug"
    )
    return ExitStatus.DEFECT


def _explain_lack_of_memory() -> ExitStatus:
    print_message(
        "out of memory; run it where more is free, or with fewer threads if the command has "
        "--workers"
    )
    return ExitStatus.BAD_REQUEST
