"""What people read: progress, tables, pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import QuantizationResult
    from nxdi_expertscale.demo import Demo


def to_json(value: Any) -> str:
    """A result as JSON, for ``--json``."""
    return json.dumps(dataclasses.asdict(value), default=_plain, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with bytes, rate and time left; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("quantizing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def quantization_summary(result: QuantizationResult) -> str:
    """What ``quantize`` made, in a few lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("before", _gigabytes(result.source_bytes))
    table.add_row("after", f"{_gigabytes(result.output_bytes)} in {result.shards} files")
    table.add_row("time", f"{result.seconds:.1f} s")
    for kind, count in result.tensors.items():
        table.add_row(kind, f"{count} tensors")
    if result.modules_to_not_convert:
        table.add_row("left as they are", ", ".join(result.modules_to_not_convert))
    if result.resumed_shards:
        table.add_row("from an earlier run", f"{result.resumed_shards} files")
    return f"{result.destination}\n{rendered(table)}"


def demo_table(result: Demo) -> str:
    """The error of each layer's MoE output, for the two kinds of scales."""
    table = Table("layer", title="Error of the MoE output against the original")
    table.add_column("one scale per expert", justify="right")
    table.add_column("one averaged scale", justify="right")
    for layer in result.layers:
        table.add_row(str(layer.layer), f"{layer.expert_wise:.1%}", f"{layer.averaged:.1%}")
    return rendered(table)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def rendered(table: Table) -> str:
    """A table as text, as wide as the terminal."""
    buffer = io.StringIO()
    Console(file=buffer).print(table)
    return buffer.getvalue().rstrip()
