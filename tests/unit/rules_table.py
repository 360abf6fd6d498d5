"""The README's list of what is refused, written from the table of rules, never by hand.

``python -m tests.unit.rules_table`` puts it between the README's markers.
"""

from __future__ import annotations

import re
from pathlib import Path

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.limits import Effect, Limit
from nxdi_expertscale.families.unsupported import UNSUPPORTED
from nxdi_expertscale.settings.rules import RULES, Severity

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- rules: begin -->", "<!-- rules: end -->"

SPELLED_OUT = ("unsupported_model", "upstream_limit", "inexact_upstream")
"""Rules whose texts come from tables of their own, each row of which is listed."""


def render() -> str:
    """The rules in Markdown: which settings, what is wrong, what to write instead."""
    refused, warned = [], []
    for rule in RULES:
        if rule.name not in SPELLED_OUT:
            rows = refused if rule.severity is Severity.ERROR else warned
            rows.append((_code(rule.scope.value), _shown(rule.problem), _shown(rule.remedy)))
    for model in UNSUPPORTED:
        where = f" ({model.where}: `{model.line}`)" if model.line else ""
        refused.append((f"`{model.model_types[0]}`", f"{model.reason}{where}", model.remedy))
    for limit, families in _limits().items():
        rows = warned if limit.effect is Effect.INEXACT else refused
        problem = f"{limit.problem}, so that {limit.effect.value}"
        rows.append((", ".join(families), problem, _shown(limit.remedy)))
    return "\n".join([*_table(refused), "", "Warned of, and not refused:", "", *_table(warned)])


def _limits() -> dict[Limit, list[str]]:
    """NxDI's limits, and the families that have them."""
    limits: dict[Limit, list[str]] = {}
    for family in BUILT_IN:
        for limit in family.limits:
            limits.setdefault(limit, []).append(f"`{family.name}`")
    return limits


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    lines = ["| model | what is wrong | what to write instead |", "|---|---|---|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _code(scope: str) -> str:
    return re.sub(r"(\w+=\w+)", r"`\1`", scope)


def _shown(template: str) -> str:
    """A text with the names of its values for the values."""
    shown = re.sub(r"(?<!\{)\{(\w+)\}(?!\})", r"*\1*", template)
    return shown.replace("{{", "{").replace("}}", "}")


def in_readme() -> str:
    """The list in the README."""
    text = README.read_text(encoding="utf-8")
    return text.partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]


def main() -> None:
    """Write the list."""
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{README}: has not both of {BEGIN} and {END}")
    README.write_text(f"{before}{begin}\n{render()}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
