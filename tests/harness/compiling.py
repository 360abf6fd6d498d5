"""A model's way through NxD's ``ModelBuilder``: its graphs compiled, its weights cut for ranks."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CompilationStarted(Exception):  # noqa: N818
    """The compiler, which is closed, would be called now."""


def on_device(folder: Path) -> None:
    """Let this process take the way to a device: without NxD's CPU mode.

    Args:
        folder: Where NxD leaves what it compiles.
    """
    os.environ.pop("NXD_CPU_MODE", None)
    os.environ["BASE_COMPILE_WORK_DIR"] = str(folder / "compiled")


def compile_graphs(builder: Any) -> None:
    """Compile a builder's graphs, as far as NxD's open sources go.

    Raises:
        CompilationStarted: They went all the way to the compiler.
    """
    import torch_neuronx

    def generate_hlo(*_: Any, **__: Any) -> None:
        raise CompilationStarted

    torch_neuronx.xla_impl.trace.generate_hlo = generate_hlo
    builder.trace(initialize_model_weights=False)


def outcome_of(step: Callable[..., Any], *arguments: Any) -> str:
    """What comes of a step: nothing, or an error's class and message."""
    try:
        step(*arguments)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return text.removesuffix(": ")
    return ""


@contextmanager
def logged() -> Iterator[list[str]]:
    """The lines that this package logs meanwhile, warnings and worse."""
    lines: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keeping(logging.WARNING)
    logger = logging.getLogger("nxdi_expertscale")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
