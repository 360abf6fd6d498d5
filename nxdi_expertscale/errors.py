"""What this package raises, and how any error is told in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

LONGEST_LINE = 2000
"""Characters of an error that are shown. Names in it are anyone's and may be megabytes long."""


class ExpertScaleError(Exception):
    """Base class of every error that this package raises on purpose.

    The message is one sentence that names the file, tensor or setting, and what to do.

    None is a ``ValueError`` or a ``RuntimeError`` as well: callers catch those to go on in another
    way. vLLM-Neuron compiles anew after a ``ValueError`` (``_load_weights_common`` of its
    ``worker/neuronx_distributed_model_loader.py``), and a refusal would be a line in its log.
    """


class ConfigurationError(ExpertScaleError):
    """A setting, or a combination of settings, that cannot give a right model."""


class CheckpointError(ExpertScaleError):
    """A checkpoint, on disk or as a state dict, that is malformed or not supported."""


class CheckpointInUseError(CheckpointError):
    """Another process is writing the checkpoint."""


class IncompatibleUpstreamError(ExpertScaleError):
    """The feature is asked for, and the installed NxDI is not one that can be patched for it."""


_options_are_named = False


@contextmanager
def naming_options() -> Iterator[None]:
    """Let messages name options of the command line instead of parameters of functions."""
    global _options_are_named  # noqa: PLW0603
    before, _options_are_named = _options_are_named, True
    try:
        yield
    finally:
        _options_are_named = before


def parameter(name: str, value: str | None = None) -> str:
    """A setting as whoever reads a message has to write it.

    Args:
        name: The name of the function's parameter, such as ``overwrite``.
        value: What it is to be set to; not for the command line, where it is a flag or is known.

    Returns:
        ``overwrite=True`` or, within :func:`naming_options`, ``--overwrite``.
    """
    if _options_are_named:
        return f"--{name.replace('_', '-')}"
    return name if value is None else f"{name}={value}"


def damaged(where: object, what: str) -> CheckpointError:
    """The error for a file that is not what was published: to be downloaded again.

    Args:
        where: The file, and the tensor or setting in it.
        what: What is wrong with it, as in ``"has no weight_map"``.
    """
    return CheckpointError(f"{where}: {what}; download it again")


def incomplete(where: object, what: str) -> CheckpointError:
    """The error for a checkpoint that lacks a part: to be downloaded again, completely.

    Args:
        where: The folder, file or tensor.
        what: What is missing.
    """
    return CheckpointError(f"{where}: {what}; download the checkpoint again, completely")


def one_line(error: BaseException) -> str:
    """Format an error as one line that is safe to print on a terminal.

    Args:
        error: Any error.

    Returns:
        The message alone for an error of this package, file and reason for one of the operating
        system, type and message for any other. Control characters are escaped.
    """
    if isinstance(error, ExpertScaleError):
        text = str(error)
    elif isinstance(error, OSError) and error.strerror is not None:
        names = (error.filename, error.filename2)
        text = ": ".join([str(name) for name in names if name is not None] + [error.strerror])
    else:
        message = " ".join(str(error).split())
        text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return shorten(printable(text))


def counted(number: int, what: str) -> str:
    """A number of things, such as ``1 file`` or ``2 files``."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    r"""Escape what could steer a terminal or fake a line: ``"\x1b"`` becomes ``r"\x1b"``.

    Args:
        text: A name or a message that may hold what a checkpoint says.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def shorten(text: str, longest: int = LONGEST_LINE) -> str:
    """Leave out the middle of a long text; the end of a message says what to do.

    Args:
        text: The text.
        longest: How many characters of it to keep.
    """
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]} … {text[-(longest // 2) :]}"
