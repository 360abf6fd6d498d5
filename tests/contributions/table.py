"""The README's table of contributed models: written from a run on their sources, never by hand.

``python -m tests.contributions.table`` runs every contribution on the releases that
``NXDI_EXPERTSCALE_UPSTREAM`` names, with the sources in ``NXDI_EXPERTSCALE_CONTRIBUTIONS``, and
puts the table between the README's markers. With keys of models (``python -m
tests.contributions.table glm-4-5``) it runs those, and the rows of the others stay.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.contributions import running
from tests.contributions.contribution import Contribution
from tests.contributions.models import ALL

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- contributions: begin -->", "<!-- contributions: end -->"
PROPERTY = "contribution"
_WRITING_VARIABLE = "NXDI_EXPERTSCALE_WRITE_CONTRIBUTIONS"

_TOLERANCE = 0.002
"""By which a measured error may differ from the README's: another CPU, another torch."""


@dataclass(frozen=True)
class Errors:
    """What a run measured of a model, the worst of the releases.

    Attributes:
        blocks: Of the MoE blocks.
        logits: Of the logits.
        experts_alone: Of the logits where only the experts are quantized.
    """

    blocks: float
    logits: float
    experts_alone: float

    def is_within(self, other: Errors) -> bool:
        """Whether none is greater, but for the last digit."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return all(one < another + _TOLERANCE for one, another in pairs)


Rows = Mapping[str, Errors]
"""By the key of the contribution."""


def to_property(key: str, errors: Errors) -> str:
    """A model and its errors, as a property of a test report."""
    return json.dumps([key, errors.blocks, errors.logits, errors.experts_alone])


def being_written() -> bool:
    """Whether the run is to write the table rather than to check it."""
    return _WRITING_VARIABLE in os.environ


def render(rows: Rows) -> str:
    """The table in Markdown."""
    lines = [
        "| model | its code | published as | NxDI | MoE blocks | logits | logits, experts alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in ALL:
        found = rows[model.key]
        errors = (found.blocks, found.logits, found.experts_alone)
        cells = [
            model.name,
            _where(model),
            "block FP8" if model.blocks else "bfloat16",
            ", ".join(model.releases),
            *(f"{error:.1%}" for error in errors),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _where(model: Contribution) -> str:
    pull_request = model.ref.removeprefix("refs/pull/").removesuffix("/head")
    if pull_request == model.ref:
        return f"`{model.path}` at `{model.ref}`"
    return f"pull request {pull_request}, `{model.path}`"


def in_readme() -> Rows:
    """The errors in the README's table."""
    keys = {model.name: model.key for model in ALL}
    found = {}
    for line in drawn().splitlines()[2:]:
        name, *_, blocks, logits, alone = (cell.strip() for cell in line.strip("| ").split("|"))
        if name not in keys:
            continue
        errors = (float(cell.removesuffix("%")) / 100 for cell in (blocks, logits, alone))
        found[keys[name]] = Errors(*errors)
    return found


def drawn() -> str:
    """The table that the README has."""
    return README.read_text(encoding="utf-8").partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]


class _Collector:
    """A plugin that keeps the worst errors of each model."""

    def __init__(self) -> None:
        self.rows: dict[str, Errors] = {}

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties if report.when == "call" else ():
            if name == PROPERTY:
                key, *errors = json.loads(str(value))
                known = vars(self.rows.get(key, Errors(0, 0, 0))).values()
                self.rows[key] = Errors(*map(max, errors, known))


def main() -> int:
    """Run contributions, and write the table; 1 if a run failed, 2 if one was left out."""
    os.environ[_WRITING_VARIABLE] = "1"
    chosen = sys.argv[1:]
    collector = _Collector()
    tests: Any = Path(__file__).with_name("test_contributions.py")
    only = ["-k", " or ".join(f"{key}-0" for key in chosen)] if chosen else []
    if pytest.main([str(tests), "-q", "-W", "ignore", *only], plugins=[collector]) != 0:
        return 1
    rows = {**in_readme(), **collector.rows} if chosen else collector.rows
    if missing := {model.key for model in ALL} - rows.keys():
        print(f"{running.VARIABLE}: no sources of {', '.join(sorted(missing))}", file=sys.stderr)
        return 2
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        print(f"{README}: has not both of {BEGIN} and {END}", file=sys.stderr)
        return 2
    table = render(rows)
    README.write_text(f"{before}{begin}\n{table}\n{end}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
