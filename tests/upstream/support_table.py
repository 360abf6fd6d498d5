"""The README's support table: written from a run on the real sources, never by hand.

``python -m tests.upstream.support_table`` runs every cell (``support_cells.py``) on the releases
that ``NXDI_EXPERTSCALE_UPSTREAM`` names, and puts the table between the README's markers. With
``--mode logits``, which can be given again, the other modes stay as the README has them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.harness import targets

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
PROPERTY = "support"
_WRITING_VARIABLE = "NXDI_EXPERTSCALE_WRITE_SUPPORT_TABLE"

_TOLERANCE = 0.002
"""By which a measured error may differ from the README's: another CPU, another torch."""

MODES = {
    "one rank": "one scale per expert",
    "logits": "one scale per expert: logits of the whole model",
    "parameters": "one scale per expert: the worst parameter, dequantized",
    "one rank, flag off": "flag off: the average of the experts' scales",
    "logits, flag off": "flag off: logits of the whole model",
    "tensor parallel": "tensor parallel, 2 ranks",
    "expert parallel": "expert parallel, 2 ranks",
    "expert parallel, flag off": "expert parallel, flag off",
    "hybrid sharding": "hybrid sharding, 2 ranks",
    "fused token generation": "fused token generation (error of the scales that its kernel gets)",
    "beside a draft": "fused speculation with a draft of the family",
    "int8": "weights of int8",
    "f8e5m2": "weights of f8e5m2",
}
"""How a family runs, and what the table calls it."""


class Row(NamedTuple):
    """One way to run one family."""

    family: str
    mode: str


# NxDI's own step, which makes the other dtypes, does not see Llama 4's stacked experts, and NxDI
# refuses speculation for it. Its fused token generation is chosen otherwise, and not measured here.
_NOT_OF_LLAMA4 = ("int8", "f8e5m2", "beside a draft", "fused token generation")
ROWS = (
    *(Row("Qwen3 MoE", mode) for mode in MODES),
    *(Row("Mixtral", mode) for mode in MODES),
    *(Row("Llama 4", mode) for mode in MODES if mode not in _NOT_OF_LLAMA4),
)


@dataclass(frozen=True)
class Cell:
    """What comes of it.

    Attributes:
        outcome: ``runs``, ``refused`` or ``not in this release``.
        error: Of the layers' outputs against Hugging Face, or of what the mode names, where it
            runs.
        message: What it is refused with.
    """

    outcome: str
    error: float = 0.0
    message: str = ""

    def says_the_same_as(self, other: Cell) -> bool:
        """Whether it is the same but for the last digit of a measured error."""
        words = (self.outcome, self.message) == (other.outcome, other.message)
        return words and abs(self.error - other.error) < _TOLERANCE


Cells = dict[tuple[str, Row], Cell]


def to_property(release: str, row: Row, cell: Cell) -> str:
    """A cell and its place, as a property of a test report."""
    return json.dumps([release, *row, cell.outcome, cell.error, cell.message])


def being_written() -> bool:
    """Whether the run is to write the table rather than to check it."""
    return _WRITING_VARIABLE in os.environ


def is_to_run(row: Row) -> bool:
    """Whether a run is about this row: all of them, or those whose modes are to be written."""
    modes = json.loads(os.environ.get(_WRITING_VARIABLE, "null"))
    return row in ROWS and (not modes or row.mode in modes)


def render(cells: Cells) -> str:
    """The table in Markdown, and the messages of what is refused."""
    releases = sorted({release for release, _ in cells})
    messages = list(
        dict.fromkeys(cell.message for cell in cells.values() if cell.outcome == "refused")
    )
    lines = [f"| | | {' | '.join(releases)} |", f"|---|---|{'---|' * len(releases)}"]
    for row in ROWS:
        shown = [_shown(cells[release, row], messages) for release in releases]
        lines.append(f"| {row.family} | {MODES[row.mode]} | {' | '.join(shown)} |")
    lines.append("")
    lines += [f"{number}. {message}" for number, message in enumerate(messages, 1)]
    return "\n".join(lines)


def _shown(cell: Cell, messages: list[str]) -> str:
    if cell.outcome == "refused":
        return f"refused ({messages.index(cell.message) + 1})"
    return f"{cell.error:.1%}" if cell.outcome == "runs" else "—"


def in_readme() -> Cells:
    """The cells of the table in the README."""
    text = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    messages = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    lines = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("|")]
    releases = [name.strip() for name in lines[0] if name.strip()]
    rows = {(row.family, MODES[row.mode]): row for row in ROWS}
    found: Cells = {}
    for line in lines[2:]:
        family, mode, *shown = (part.strip() for part in line)
        for release, value in zip(releases, shown, strict=True):
            found[release, rows[family, mode]] = _read(value, messages)
    return found


def _read(shown: str, messages: dict[str, str]) -> Cell:
    if refused := re.fullmatch(r"refused \((\d+)\)", shown):
        return Cell("refused", message=messages[refused[1]])
    if shown.endswith("%"):
        return Cell("runs", error=float(shown[:-1]) / 100)
    return Cell("not in this release")


class _Collector:
    """A plugin that keeps the cells of the reports."""

    def __init__(self) -> None:
        self.cells: Cells = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == PROPERTY:
                release, family, mode, *cell = json.loads(str(value))
                self.cells[release, Row(family, mode)] = Cell(*cell)


def main() -> int:
    """Run every cell, and write the table; 1 if a run failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.upstream.support_table")
    parser.add_argument("--mode", action="append", choices=MODES, default=[])
    modes = parser.parse_args().mode
    if len(targets.all_targets()) == 1:
        print(f"{targets.UPSTREAM_VARIABLE} names no release", file=sys.stderr)
        return 2
    os.environ[_WRITING_VARIABLE] = json.dumps(modes)
    collector = _Collector()
    cells: Any = Path(__file__).with_name("support_cells.py")
    status = pytest.main([str(cells), "-q", "-W", "ignore"], plugins=[collector])
    if status != 0:
        return 1
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{README}: has not both of {BEGIN} and {END}", file=sys.stderr)
        return 2
    measured = {**(in_readme() if modes else {}), **collector.cells}
    README.write_text(f"{before}{begin}\n{render(measured)}\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
