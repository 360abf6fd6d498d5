"""What people read: progress, tables, pictures."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from nxdi_expertscale.errors import ConfigurationError

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import QuantizationResult
    from nxdi_expertscale.demo import Demo
    from nxdi_expertscale.evaluation import Agreement, Evaluation


def to_json(value: Any) -> str:
    """A result as JSON, for ``--json``."""
    return json.dumps(dataclasses.asdict(value), default=_plain, indent=2)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


BYTES = (DownloadColumn(), TransferSpeedColumn())
"""What a bar shows of work that is measured in bytes."""

STEPS = (MofNCompleteColumn(),)
"""What a bar shows of work that is measured in steps."""


@contextmanager
def progress_bar(
    task: str, measure: Sequence[ProgressColumn]
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with the time that is left; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        *measure,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task(task, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


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


def evaluation_table(result: Evaluation) -> str:
    """The original, and the quantized checkpoint with each kind of scales."""
    table = Table("")
    for column in (
        "perplexity",
        "KL divergence",
        "same top-1 token",
        "error of the experts' output",
    ):
        table.add_column(column, justify="right")
    table.add_row("original", f"{result.perplexity:.4g}", "", "", "")
    for name, found in scale_kinds(result).items():
        change = found.perplexity / result.perplexity - 1
        errors = found.layer_errors.values()
        table.add_row(
            name,
            f"{found.perplexity:.4g} ({change:+.1%})",
            f"{found.kl_divergence:.2g} nats",
            f"{found.top1_agreement:.1%}",
            f"{min(errors):.1%} to {max(errors):.1%}",
        )
    where = f"{result.tokens} tokens of {result.text}, {result.sequence} at a time"
    return f"{rendered(table)}\n{where}; {result.seconds:.0f} s"


def scale_kinds(result: Evaluation) -> dict[str, Agreement]:
    """What was measured, by the name that people read."""
    return {"one scale per expert": result.expert_wise, "one averaged scale": result.averaged}


def plot_evaluation(result: Evaluation, path: Path) -> None:
    """Draw the errors of all layers, and the perplexities, into a PNG file.

    Raises:
        ConfigurationError: matplotlib is not installed.
    """
    figure = _figure(width=10, height=4)
    layers, perplexities = figure.subplots(1, 2, width_ratios=(3, 2))
    kinds = scale_kinds(result)
    for (name, found), colour in zip(kinds.items(), _COLOURS[1:], strict=True):
        numbers, errors = found.layer_errors.keys(), found.layer_errors.values()
        layers.plot(list(numbers), [100 * e for e in errors], "o-", color=colour, label=name)
    layers.set_yscale("log")
    layers.yaxis.set_major_formatter("{x:g} %")
    layers.xaxis.get_major_locator().set_params(integer=True)
    layers.set_xlabel("layer")
    layers.set_title("Error of the experts' output, given the original's input")
    layers.grid(axis="y", which="both", alpha=0.3)
    layers.legend()
    values = [result.perplexity, *(found.perplexity for found in kinds.values())]
    names = ["original", *(name.replace(" scale", "\nscale") for name in kinds)]
    bars = perplexities.bar(names, values, color=_COLOURS)
    perplexities.bar_label(bars, fmt="{:.4g}")
    perplexities.set_title("Perplexity (lower is better)")
    perplexities.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=150)


_COLOURS = ("#7f7f7f", "#1f77b4", "#d62728")
"""Of the original, of expert-wise scales, and of averaged ones."""


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigurationError(
            "pictures are drawn with matplotlib, which is not installed: "
            "pip install 'nxdi-expertscale[plot]'"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def rendered(table: Table) -> str:
    """A table as text, as wide as the terminal."""
    buffer = io.StringIO()
    Console(file=buffer).print(table)
    return buffer.getvalue().rstrip()
