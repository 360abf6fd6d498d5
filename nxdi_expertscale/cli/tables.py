"""Formats results as the tables and lines that people read in a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from rich import filesize
from rich.console import Console
from rich.table import Table

from nxdi_expertscale.errors import counted, printable, shorten

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import DryRun, Inspection, QuantizationResult, Verification
    from nxdi_expertscale.diagnostics.doctor import Examination
    from nxdi_expertscale.evaluation.comparison import Metrics
    from nxdi_expertscale.evaluation.demo import Demo
    from nxdi_expertscale.evaluation.evaluate import Evaluation

MOST_NAMES = 8
"""Names that are listed in a line."""

MOST_FAULTS = 50
"""Faults that are listed."""

MOST_LAYERS = 256
"""Layers that a table lists: more than any real model has."""

_Row = TypeVar("_Row")


def quantization_summary(result: QuantizationResult) -> str:
    """Format what ``quantize`` made, in a few lines."""
    rows = {
        "before": filesize.decimal(result.source_bytes),
        "after": f"{filesize.decimal(result.output_bytes)} in {counted(result.shards, 'file')}",
        "time": f"{result.seconds:.1f} s",
        **{kind: counted(number, "tensor") for kind, number in result.tensors.items()},
    }
    if result.modules_to_not_convert:
        rows["in full precision"] = listed(result.modules_to_not_convert)
    if result.mtp_left_out:
        rows["left out (MTP)"] = counted(result.mtp_left_out, "tensor")
    if result.resumed_shards:
        rows["from an earlier run"] = counted(result.resumed_shards, "file")
    if result.below_floor:
        rows["too small for FP8"] = listed(result.below_floor)
    return f"{result.destination}\n{_pairs(rows)}"


def dry_run_summary(found: DryRun) -> str:
    """Format what ``quantize`` would make and take."""
    scheme = f", {found.scheme}" if found.scheme else ""
    rows = {
        "source": found.source,
        **({"pinned to": found.origin} if found.origin else {}),
        "model": f"{found.model_type}, family {found.family}{scheme}",
        "before": filesize.decimal(found.source_bytes),
        "after": f"{filesize.decimal(found.output_bytes)} in {counted(found.shards, 'file')}",
        **{kind: counted(number, "tensor") for kind, number in found.tensors.items()},
    }
    if found.mtp_left_out:
        rows["left out (MTP)"] = counted(found.mtp_left_out, "tensor")
    if found.code_left_out:
        rows["code, not copied"] = listed(found.code_left_out)
    needed, free = map(filesize.decimal, (found.disk_bytes, found.disk_free_bytes))
    rows["disk"] = f"{needed} needed, {free} free{'' if found.fits else ': too little'}"
    if found.spool_bytes:
        rows["spool"] = f"{filesize.decimal(found.spool_bytes)} while it runs (--spool)"
    rows["memory"] = filesize.decimal(found.memory_bytes)
    rate = filesize.decimal(int(found.bytes_per_second))
    rows["time"] = (
        f"{_duration(found.seconds)} to convert ({rate}/s with {counted(found.workers, 'thread')}, "
        "measured now); longer where reading or writing is slower"
    )
    lines = [f"{_line(str(found.destination))} (nothing is written)", _pairs(rows)]
    lines.append("Not quantized")
    for kept in found.in_full_precision:
        count = f"{counted(kept.tensors, 'tensor')}, {filesize.decimal(kept.nbytes)}"
        lines.append(_line(f"  {count}: {kept.reason}"))
    lines += [_line(f"warning: {limit}") for limit in found.limits]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """A time as people say it: in the unit that leaves at least two of it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"


def examination(found: Examination) -> str:
    """Format what ``doctor`` found, its verdict last."""
    release = found.release
    known = f"NxDI {release.nxdi}, Neuron SDK {release.sdk}" if release else "none that was tested"
    packages = {name: version or "absent" for name, version in found.packages.items()}
    sections = [
        ("Installed", {**packages, "release": known}),
        ("Seams", {seam.seam: f"{seam.state} {seam.reason}".strip() for seam in found.seams}),
        ("Activation", found.activation),
        ("Device", found.device),
        ("Model", found.model),
    ]
    parts = [f"{title}\n{_pairs(rows, indent=2)}" for title, rows in sections if rows]
    parts += [f"warning: {_line(warning)}" for warning in found.warnings]
    parts += [f"problem: {_line(problem)}" for problem in found.problems]
    return "\n\n".join([*parts, found.verdict])


def verification_summary(result: Verification) -> str:
    """Format what ``verify`` found: the faults, the error of each layer, the verdict last."""
    shown, rest = _first(result.faults, MOST_FAULTS)
    lines = [_line(f"{fault.where}: {fault.what}") for fault in shown]
    if rest:
        lines.append(f"and {rest} more faults; --json lists them all")
    shown, rest = _first(result.warnings, MOST_FAULTS)
    lines += [_line(f"warning: {warning.where}: {warning.what}") for warning in shown]
    if rest:
        lines.append(f"and {rest} more warnings; --json lists them all")
    if result.layers:
        table = Table("layer", title="Error against the source")
        table.add_column("signal to noise", justify="right")
        table.add_column("worst tensor", overflow="fold")
        table.add_column("its own", justify="right")
        layers, rest = _first(result.layers, MOST_LAYERS)
        for layer in layers:
            table.add_row(
                layer.layer,
                _decibels(layer.snr_db),
                _line(layer.worst_tensor),
                _decibels(layer.worst_snr_db),
            )
        lines.append(_rendered(table) + _more_layers(rest))
    verdict = counted(len(result.faults), "fault") if result.faults else "good"
    lines.append(
        f"{_line(str(result.folder))}: {verdict} "
        f"({counted(result.files, 'file')}, {counted(result.quantized, 'quantized weight')})"
    )
    return "\n".join(lines)


def _decibels(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"


def inspection_summary(result: Inspection) -> str:
    """Format what ``inspect`` found."""
    facts = Table(show_header=False, box=None, pad_edge=False)
    facts.add_row("model", _line(result.model_type))
    facts.add_row("weights", result.scheme or "full precision")
    for dtype, nbytes in result.dtypes.items():
        facts.add_row("", f"{dtype} {filesize.decimal(nbytes)}")
    if result.made_by is not None:
        facts.add_row("made by", _line(f"nxdi-expertscale {result.made_by}"))
    facts.add_row("experts", f"{result.num_experts} in each of {len(result.layers)} layers")
    if result.below_floor:
        facts.add_row("too small for FP8", listed(result.below_floor))
    table = Table("layer", title="Scales of the experts")
    table.add_column("largest over smallest", justify="right")
    table.add_column("error of one shared scale", justify="right")
    layers, rest = _first(result.layers, MOST_LAYERS)
    for layer in layers:
        table.add_row(str(layer.layer), f"{layer.spread:.2f}", f"{layer.shared_scale_error:.1%}")
    folder = _line(str(result.folder))
    return f"{folder}\n{_rendered(facts)}\n{_rendered(table)}{_more_layers(rest)}"


def demo_summary(result: Demo, picture: str) -> str:
    """Format what the demo made and measured, and what to type next.

    Args:
        result: What the demo made and measured.
        picture: Where its picture is, or what drawing one needs.
    """
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
    """Format the original beside the quantized checkpoint with each kind of scales."""
    table = Table("FP8 scales", title=title, title_justify="left")
    for column in ("perplexity", "KL, nats", "same top-1", "experts' error"):
        table.add_column(column, justify="right")
    table.add_row("none (original)", f"{result.perplexity:.4g}", "", "", "")
    for name, measured in by_kind_of_scales(result).items():
        change = measured.perplexity / result.perplexity - 1
        errors = measured.layer_errors.values()
        table.add_row(
            name,
            f"{measured.perplexity:.4g} ({change:+.2%})",
            f"{measured.kl_divergence:.2g}",
            f"{measured.top1_agreement:.1%}",
            f"{100 * min(errors):.3g}% to {100 * max(errors):.3g}%",
        )
    where = f"{result.tokens} tokens of {_line(result.text)}, {result.sequence} at a time"
    return f"{_rendered(table)}\n{where}; {result.seconds:.0f} s"


def by_kind_of_scales(result: Evaluation) -> dict[str, Metrics]:
    """What was measured with each kind of scales, by the name that people read."""
    return {"one per expert": result.expert_wise, "one, averaged": result.averaged}


def listed(names: Sequence[str]) -> str:
    """Format names as a list in one line, the first :data:`MOST_NAMES` of them."""
    shown, rest = _first(names, MOST_NAMES)
    return ", ".join(map(_line, shown)) + (f" and {rest} more" if rest else "")


def _first(items: Sequence[_Row], most: int) -> tuple[Sequence[_Row], int]:
    """The first of some items, and how many are left out."""
    return items[:most], max(0, len(items) - most)


def _more_layers(count: int) -> str:
    return f"\nand {count} more layers; --json lists them all" if count else ""


def _line(text: str) -> str:
    return shorten(printable(text))


def _pairs(rows: Mapping[str, str], indent: int = 0) -> str:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(" " * indent + _line(name), _line(value))
    return _rendered(table)


def _rendered(table: Table) -> str:
    """Format a table as text, as wide as the terminal, in characters that stdout can show."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    buffer = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace", newline="\n")
    # Names of tensors are anyone's, and are no markup. What is printed may go to a file.
    console = Console(
        file=buffer,
        markup=False,
        emoji=False,
        highlight=False,
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
    )
    console.print(table)
    buffer.seek(0)
    return _without_trailing_spaces(buffer.read().splitlines())


def _without_trailing_spaces(lines: Iterable[str]) -> str:
    return "\n".join(line.rstrip() for line in lines).rstrip()
