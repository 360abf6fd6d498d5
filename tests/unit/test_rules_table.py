"""The README's list of what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxdi_expertscale.families.built_in import BUILT_IN
from nxdi_expertscale.families.unsupported import UNSUPPORTED
from nxdi_expertscale.settings.rules import RULES
from tests.unit import rules_table


def test_readme_lists_every_rule_as_it_is() -> None:
    assert rules_table.in_readme() == rules_table.render(), "run 'python -m tests.unit.rules_table'"


def test_list_has_a_row_for_each_rule_and_each_limit() -> None:
    rows = [line for line in rules_table.render().splitlines() if line.startswith("| ")]

    own = [rule for rule in RULES if rule.name not in rules_table.SPELLED_OUT]
    limits = {limit for family in BUILT_IN for limit in family.limits}
    heads = 2
    assert len(rows) == len(own) + len(limits) + len(UNSUPPORTED) + heads
    for limit in limits:
        assert any(limit.problem in row for row in rows)


def test_command_writes_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{rules_table.BEGIN}\nold\n{rules_table.END}\nafter\n")
    monkeypatch.setattr(rules_table, "README", readme)

    rules_table.main()

    assert rules_table.in_readme() == rules_table.render()
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter\n")
