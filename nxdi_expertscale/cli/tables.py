"""Formats results as the tables and lines that people read in a terminal."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from rich import filesize
from rich import table as rich
from rich.console import Console

from nxdi_expertscale.display.results import MOST_LAYERS, Shown, Table, first, line, listed
from nxdi_expertscale.errors import counted

if TYPE_CHECKING:
    from nxdi_expertscale.checkpoint import DryRun, Inspection, QuantizationResult, Verification
    from nxdi_expertscale.diagnostics.doctor import Examination
    from nxdi_expertscale.evaluation.demo import Demo
    from nxdi_expertscale.evaluation.evaluate import Evaluation

MOST_FAULTS = 50
"""Faults that are listed."""


def quantization_summary(result: QuantizationResult) -> str:
    """Format what ``quantize`` made, in a few lines."""
    return _summary(result)


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
    lines = [f"{line(str(found.destination))} (nothing is written)", _pairs(rows)]
    lines.append("Not quantized")
    for kept in found.in_full_precision:
        count = f"{counted(kept.tensors, 'tensor')}, {filesize.decimal(kept.nbytes)}"
        lines.append(line(f"  {count}: {kept.reason}"))
    lines += [line(f"warning: {limit}") for limit in found.limits]
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
    parts += [f"warning: {line(warning)}" for warning in found.warnings]
    parts += [f"problem: {line(problem)}" for problem in found.problems]
    return "\n\n".join([*parts, found.verdict])


def verification_summary(result: Verification) -> str:
    """Format what ``verify`` found: the faults, the error of each layer, the verdict last."""
    shown, rest = first(result.faults, MOST_FAULTS)
    lines = [line(f"{fault.where}: {fault.what}") for fault in shown]
    if rest:
        lines.append(f"and {rest} more faults; --json lists them all")
    shown, rest = first(result.warnings, MOST_FAULTS)
    lines += [line(f"warning: {warning.where}: {warning.what}") for warning in shown]
    if rest:
        lines.append(f"and {rest} more warnings; --json lists them all")
    if result.layers:
        lines.append(_layers(result.error_table()))
    verdict = counted(len(result.faults), "fault") if result.faults else "good"
    lines.append(
        f"{line(str(result.folder))}: {verdict} "
        f"({counted(result.files, 'file')}, {counted(result.quantized, 'quantized weight')})"
    )
    return "\n".join(lines)


def inspection_summary(result: Inspection) -> str:
    """Format what ``inspect`` found."""
    return "\n".join([_summary(result), *map(_layers, result.tables())])


def _summary(result: Shown) -> str:
    """The place of a checkpoint, and what else there is to say of it."""
    facts = dict(result.facts())
    return f"{line(facts.pop('checkpoint'))}\n{_pairs(facts)}"


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
    (table,) = result.tables()
    where = f"{result.tokens} tokens of {line(result.text)}, {result.sequence} at a time"
    return f"{_rendered(_table(table, title))}\n{where}; {result.seconds:.0f} s"


def _layers(table: Table) -> str:
    """Format a table with a row for each layer."""
    rows, rest = first(table.rows, MOST_LAYERS)
    more = f"\nand {rest} more layers; --json lists them all" if rest else ""
    return _rendered(_table(replace(table, rows=tuple(rows)), table.title)) + more


def _table(table: Table, title: str | None) -> rich.Table:
    shown = rich.Table(title=title, title_justify="left")
    for number, column in enumerate(table.columns):
        is_name = table.holds_names(number)
        shown.add_column(column, justify="left" if is_name else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(line, row))
    return shown


def _pairs(rows: Mapping[str, str], indent: int = 0) -> str:
    table = rich.Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(" " * indent + line(name), line(value))
    return _rendered(table)


def _rendered(table: rich.Table) -> str:
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
