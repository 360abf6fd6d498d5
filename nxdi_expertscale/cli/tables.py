"""What people read in a terminal: progress and tables."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import filesize
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
from rich.text import Text

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import Inspection, QuantizationResult, Verification
    from nxdi_expertscale.diagnostics.doctor import Examination
    from nxdi_expertscale.evaluation.comparison import Metrics
    from nxdi_expertscale.evaluation.demo import Demo
    from nxdi_expertscale.evaluation.evaluate import Evaluation


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
    what: str, measure: Sequence[ProgressColumn] = BYTES
) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with what is done and the time left; nothing where it is no terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        *measure,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def quantization_summary(result: QuantizationResult) -> str:
    """What ``quantize`` made, in a few lines."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("before", filesize.decimal(result.source_bytes))
    table.add_row("after", f"{filesize.decimal(result.output_bytes)} in {result.shards} files")
    table.add_row("time", f"{result.seconds:.1f} s")
    for kind, count in result.tensors.items():
        table.add_row(kind, f"{count} tensors")
    if result.modules_to_not_convert:
        table.add_row("left as they are", ", ".join(result.modules_to_not_convert))
    if result.resumed_shards:
        table.add_row("from an earlier run", f"{result.resumed_shards} files")
    return f"{result.destination}\n{rendered(table)}"


def examination(found: Examination) -> str:
    """What ``doctor`` found, its verdict last."""
    release = found.release
    known = f"NxDI {release.nxdi}, Neuron SDK {release.sdk}" if release else "none that was tested"
    packages = {name: version or "absent" for name, version in found.packages.items()}
    sections = [
        ("Installed", {**packages, "release": known}),
        ("Seams", {seam.seam: f"{seam.state} {seam.reason}".strip() for seam in found.seams}),
        ("Activation", found.activation),
        ("Device", found.device),
    ]
    parts = [f"{title}\n{_pairs(rows)}" for title, rows in sections if rows]
    parts += [f"warning: {warning}" for warning in found.warnings]
    parts += [f"problem: {problem}" for problem in found.problems]
    return "\n\n".join([*parts, found.verdict])


def _pairs(rows: Mapping[str, str]) -> str:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(f"  {name}", Text(value))
    return rendered(table)


def verification_summary(result: Verification) -> str:
    """What ``verify`` found."""
    lines = [f"{fault.where}: {fault.what}" for fault in result.faults]
    if result.layers:
        table = Table("layer", title="Error against the source")
        table.add_column("signal to noise", justify="right")
        table.add_column("worst tensor", overflow="fold")
        table.add_column("its own", justify="right")
        for layer in result.layers:
            table.add_row(
                layer.layer,
                _decibels(layer.snr_db),
                layer.worst_tensor,
                _decibels(layer.worst_snr_db),
            )
        lines.append(rendered(table))
    verdict = f"{len(result.faults)} faults" if result.faults else "good"
    lines.append(
        f"{result.folder}: {verdict} ({result.files} files, {result.quantized} quantized weights)"
    )
    return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def inspection_summary(result: Inspection) -> str:
    """What ``inspect`` found."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("model", result.model_type)
    facts.add_row("weights", result.scheme or "full precision")
    for dtype, nbytes in result.dtypes.items():
        facts.add_row("", f"{dtype} {filesize.decimal(nbytes)}")
    if result.made_by is not None:
        facts.add_row("made by", f"nxdi-expertscale {result.made_by}")
    facts.add_row("experts", f"{result.num_experts} in each of {len(result.layers)} layers")
    table = Table("layer", title="Scales of the experts")
    table.add_column("largest over smallest", justify="right")
    table.add_column("error of one shared scale", justify="right")
    for layer in result.layers:
        table.add_row(str(layer.layer), f"{layer.spread:.2f}", f"{layer.shared_scale_error:.1%}")
    return f"{result.folder}\n{rendered(facts)}\n{rendered(table)}"


def demo_summary(result: Demo, picture: str) -> str:
    """What the demo made and found, its picture (or what that needs), and what to type next."""
    origin = "trained now" if result.trained else "trained by an earlier run"
    example = result.as_trained
    return "\n".join(
        [
            f"A small Qwen3 MoE, {origin} on Python's own library; bytes predicted only by how",
            f"often they occur have a perplexity of {result.unigram_perplexity:.3g}.",
            "",
            evaluation_table(example, "As trained"),
            "",
            evaluation_table(
                result.spread, "The same function, experts 16-fold apart in magnitude"
            ),
            "",
            f"models   {result.folder}",
            f"picture  {picture}",
            "",
            "Now with a model of your own, a folder from the Hugging Face hub:",
            "  nxdi-expertscale quantize MODEL MODEL-FP8",
            "  nxdi-expertscale evaluate MODEL MODEL-FP8 --plot evaluation.png",
        ]
    )


def evaluation_table(result: Evaluation, title: str | None = None) -> str:
    """The original, and the quantized checkpoint with each kind of scales."""
    table = Table("FP8 scales", title=title, title_justify="left")
    for column in ("perplexity", "KL, nats", "same top-1", "experts' error"):
        table.add_column(column, justify="right")
    table.add_row("none (original)", f"{result.perplexity:.4g}", "", "", "")
    for name, found in scale_kinds(result).items():
        change = found.perplexity / result.perplexity - 1
        errors = found.layer_errors.values()
        table.add_row(
            name,
            f"{found.perplexity:.4g} ({change:+.2%})",
            f"{found.kl_divergence:.2g}",
            f"{found.top1_agreement:.1%}",
            f"{100 * min(errors):.3g}% to {100 * max(errors):.3g}%",
        )
    where = f"{result.tokens} tokens of {result.text}, {result.sequence} at a time"
    return f"{rendered(table)}\n{where}; {result.seconds:.0f} s"


def scale_kinds(result: Evaluation) -> dict[str, Metrics]:
    """What was measured, by the name that people read."""
    return {"one per expert": result.expert_wise, "one, averaged": result.averaged}


def rendered(table: Table) -> str:
    """A table as text, as wide as the terminal."""
    buffer = io.StringIO()
    # Names of tensors are anyone's, and are no markup.
    Console(file=buffer, markup=False, emoji=False).print(table)
    return buffer.getvalue().rstrip()
